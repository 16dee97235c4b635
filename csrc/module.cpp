// The nanobind module el4ner._native. Shapes and dtypes are checked in kernels/*.py; here only what memory safety needs.
#include <cstdint>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "span_topk_binding.hpp"
#include "vote.hpp"

namespace nb = nanobind;

template <typename T, typename Shape>
using Array = nb::ndarray<nb::numpy, T, Shape, nb::c_contig, nb::device::cpu>;

using Logp = Array<const float, nb::ndim<3>>;
using Weights = Array<const double, nb::ndim<2>>;
using Winners = Array<std::int64_t, nb::ndim<1>>;
using Floats = Array<float, nb::ndim<1>>;

static void vote(Logp logp, Weights weights, bool hard, Winners winners, Floats scores, Floats margins) {
    const auto members = logp.shape(0), spans = logp.shape(1), labels = logp.shape(2);
    if (weights.shape(0) != members || weights.shape(1) != labels || winners.shape(0) != spans ||
        scores.shape(0) != spans || margins.shape(0) != spans)
        throw nb::value_error("vote: shapes do not match");
    nb::gil_scoped_release release;
    el4ner::vote(logp.data(), weights.data(), static_cast<std::int64_t>(members), static_cast<std::int64_t>(spans),
                 static_cast<std::int64_t>(labels), hard, winners.data(), scores.data(), margins.data());
}

NB_MODULE(_native, module) {
    module.doc() = "Compiled kernels of el4ner; call them through el4ner.kernels.";
    module.def("vote", &vote, nb::arg("logp"), nb::arg("weights"), nb::arg("hard"), nb::arg("winners").noconvert(),
               nb::arg("scores").noconvert(), nb::arg("margins").noconvert(),
               "logp (M, S, L) f32, weights (M, L) f64; writes winners (S,) i64, scores (S,) f32, margins (S,) f32.");
    el4ner::bind_span_topk(module);
}
