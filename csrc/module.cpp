// The nanobind module el4ner._native. Shapes and dtypes are checked in kernels/*.py; here only what memory safety needs.
#include <cstdint>
#include <optional>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include "choice_logprobs.hpp"
#include "peak.hpp"
#include "span_scores.hpp"
#include "span_topk_binding.hpp"
#include "vote.hpp"

namespace nb = nanobind;

template <typename T, typename Shape>
using Array = nb::ndarray<nb::numpy, T, Shape, nb::c_contig, nb::device::cpu>;

using Logp = Array<const float, nb::ndim<3>>;
using Weights = Array<const double, nb::ndim<2>>;
using Floats = Array<float, nb::ndim<1>>;

using Floats2 = Array<const float, nb::ndim<2>>;
using FloatsOut3 = Array<float, nb::ndim<3>>;
using Halves2 = Array<const std::uint16_t, nb::ndim<2>>;
using Bias = Array<const float, nb::ndim<1>>;
using Doubles = Array<double, nb::ndim<1>>;
using Integers = Array<std::int64_t, nb::ndim<1>>;

static bool vote(Logp logp, Weights weights, bool hard, Integers winners, Floats scores, Floats margins,
                 std::int64_t threads) {
    const auto members = logp.shape(0), spans = logp.shape(1), labels = logp.shape(2);
    if (weights.shape(0) != members || weights.shape(1) != labels || winners.shape(0) != spans ||
        scores.shape(0) != spans || margins.shape(0) != spans)
        throw nb::value_error("vote: shapes do not match");
    const el4ner::VoteCall call{logp.data(), weights.data(), static_cast<std::int64_t>(members),
                                static_cast<std::int64_t>(spans), static_cast<std::int64_t>(labels), hard,
                                winners.data(), scores.data(), margins.data()};
    nb::gil_scoped_release release;
    return el4ner::vote(call, threads);
}

static void span_scores(Floats2 mean, Floats2 last, FloatsOut3 out, std::int64_t threads) {
    if (mean.shape(0) != last.shape(0) || mean.shape(1) != last.shape(1) || out.shape(0) != mean.shape(0) ||
        out.shape(2) != mean.shape(1))
        throw nb::value_error("span_scores: shapes do not match");
    const el4ner::SpanScoresCall call{mean.data(), last.data(), static_cast<std::int64_t>(mean.shape(0)),
                                      static_cast<std::int64_t>(out.shape(1)),
                                      static_cast<std::int64_t>(mean.shape(1)), out.data()};
    nb::gil_scoped_release release;
    el4ner::span_scores(call, threads);
}

static bool best_flat(Logp scores, std::int64_t none, Integers taken, Integers label) {
    const auto tokens = scores.shape(0), labels = scores.shape(2);
    if (taken.shape(0) != tokens || label.shape(0) != tokens || none < 0 || none >= static_cast<std::int64_t>(labels))
        throw nb::value_error("best_flat: shapes do not match");
    nb::gil_scoped_release release;
    return el4ner::best_flat(scores.data(), static_cast<std::int64_t>(tokens),
                             static_cast<std::int64_t>(scores.shape(1)), static_cast<std::int64_t>(labels), none,
                             taken.data(), label.data());
}

// Half: hidden and head are bfloat16, passed as their bits.
template <typename Matrix, bool Half>
static void log_totals(Matrix hidden, Matrix head, std::optional<Bias> bias, float scale, float soft_cap,
                       Doubles log_total, std::int64_t threads) {
    if (hidden.shape(1) != head.shape(1) || log_total.shape(0) != hidden.shape(0) ||
        (bias && bias->shape(0) != head.shape(0)))
        throw nb::value_error("choice_log_totals: shapes do not match");
    const el4ner::HeadCall call{hidden.data(), head.data(), Half, static_cast<std::int64_t>(hidden.shape(0)),
                                static_cast<std::int64_t>(hidden.shape(1)), static_cast<std::int64_t>(head.shape(0)),
                                bias ? bias->data() : nullptr, scale, soft_cap, log_total.data()};
    nb::gil_scoped_release release;
    el4ner::choice_log_totals(call, threads);
}

NB_MODULE(_native, module) {
    module.doc() = "Compiled kernels of el4ner; call them through el4ner.kernels.";
    module.attr("interface") = EL4NER_INTERFACE;  // of setup.py
    module.def("vote", &vote, nb::arg("logp"), nb::arg("weights"), nb::arg("hard"), nb::arg("winners").noconvert(),
               nb::arg("scores").noconvert(), nb::arg("margins").noconvert(), nb::arg("threads"),
               "logp (M, S, L) f32, weights (M, L) f64; writes winners (S,) i64, scores (S,) f32, margins (S,) f32. "
               "False: a row is partly NaN or holds +inf, and what was written is of no use.");
    module.def("span_scores", &span_scores, nb::arg("mean_part"), nb::arg("last_part"), nb::arg("out").noconvert(),
               nb::arg("threads"), "mean_part, last_part (T, L) f32; writes out (T, N, L) f32.");
    module.def("best_flat", &best_flat, nb::arg("scores"), nb::arg("none_label"), nb::arg("taken").noconvert(),
               nb::arg("label").noconvert(),
               "scores (T, N, L) f32; writes taken, label (T,) i64. False: NaN, +inf or an infinite score of "
               "none_label inside the text, and what was written is of no use.");
    module.def("choice_log_totals_f32", &log_totals<Floats2, false>, nb::arg("hidden"), nb::arg("head"),
               nb::arg("bias").none(), nb::arg("scale"), nb::arg("soft_cap"), nb::arg("log_total").noconvert(),
               nb::arg("threads"), "hidden (R, H), head (V, H) f32; writes log_total (R,) f64. soft_cap 0: none.");
    module.def("choice_log_totals_bf16", &log_totals<Halves2, true>, nb::arg("hidden"), nb::arg("head"),
               nb::arg("bias").none(), nb::arg("scale"), nb::arg("soft_cap"), nb::arg("log_total").noconvert(),
               nb::arg("threads"), "The same with the bits of bfloat16 numbers, as uint16.");
    module.def("peak_flops", &el4ner::peak_flops, nb::arg("bf16"), nb::arg("rounds"),
               "FLOP/s of one core in registers, the best of some rounds; 0 without AVX-512 (BF16).");
    module.def("instruction_set", [] { return static_cast<int>(el4ner::instruction_set()); },
               "0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16, 4 AMX: what the next call will use.");
    el4ner::bind_span_topk(module);
}
