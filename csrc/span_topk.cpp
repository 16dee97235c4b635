// span_topk in the module el4ner._native. Values are checked in kernels/span_topk.py; here only what memory safety needs.
#include "span_topk.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include "span_topk_binding.hpp"
#include "span_topk_peak.hpp"

namespace nb = nanobind;

namespace el4ner {
namespace {

using namespace topk;

template <typename T, typename Shape>
using Array = nb::ndarray<nb::numpy, T, Shape, nb::c_contig, nb::device::cpu>;
using Floats2 = Array<const float, nb::ndim<2>>;
using Ints1 = Array<const std::int64_t, nb::ndim<1>>;
using Doubles1 = Array<const double, nb::ndim<1>>;

Precision precision_of(const std::string &name) {
    if (name == "fp32") return Precision::fp32;
    if (name == "bf16") return Precision::bf16;
    if (name == "int8") return Precision::int8;
    throw nb::value_error("span_topk: precision");
}

Isa isa_of(const std::string &name) {
    if (name == "portable") return Isa::portable;
    if (name == "avx2") return Isa::avx2;
    if (name == "avx512") return Isa::avx512;
    if (name == "amx") return Isa::amx;
    throw nb::value_error("span_topk: instruction set");
}

void check_offsets(const Ints1 &offsets, std::size_t rows) {
    bool fits = offsets.shape(0) > 0 && offsets(0) == 0 && offsets(offsets.shape(0) - 1) == static_cast<std::int64_t>(rows);
    for (std::size_t n = 1; fits && n < offsets.shape(0); ++n) fits = offsets(n) >= offsets(n - 1);
    if (!fits) throw nb::value_error("span_topk: offsets");
}

PackedPool *pack(Floats2 vectors, Ints1 offsets, double largest_norm, const std::string &precision, const std::string &isa,
                 int threads, bool share) {
    check_offsets(offsets, vectors.shape(0));
    // integer sums of 255 * 127 * D stay below 2^31, sentence numbers below 2^31
    if (vectors.shape(1) > 60000 || offsets.shape(0) > (std::size_t{1} << 31) - 64)
        throw nb::value_error("span_topk: at most 60,000 columns and 2^31 sentences");
    const Precision chosen = precision_of(precision);
    if (!cpu_has(isa_of(isa), chosen)) throw nb::value_error("span_topk: this CPU lacks the instructions");
    const bool in_pairs = paired(chosen, isa_of(isa));
    nb::gil_scoped_release release;
    return new PackedPool(vectors.data(), offsets.data(), static_cast<std::int64_t>(offsets.shape(0)) - 1,
                          static_cast<std::int64_t>(vectors.shape(1)), largest_norm, chosen, in_pairs, threads, share ? -1 : 0);
}

double longest(Floats2 vectors, int threads) {
    const Isa isa = cpu_has(Isa::avx512, Precision::fp32) ? Isa::avx512
                    : cpu_has(Isa::avx2, Precision::fp32) ? Isa::avx2
                                                          : Isa::portable;
    const Kernels kernels = kernels_for(Precision::fp32, isa);
    nb::gil_scoped_release release;
    return largest_norm(vectors.data(), static_cast<std::int64_t>(vectors.shape(0)),
                        static_cast<std::int64_t>(vectors.shape(1)), kernels.dot64, threads);
}

nb::dict counts(const Statistics &done) {
    nb::dict out;
    out["queries"] = done.queries;
    out["certified"] = done.certified;
    out["candidates"] = done.candidates;
    out["bounded"] = done.bounded;
    out["rescored"] = done.rescored;
    return out;
}

nb::dict choose_among(Floats2 vectors, Ints1 offsets, double largest_norm, Floats2 queries, Ints1 query_offsets,
                      Doubles1 weights, Ints1 excluded, Ints1 excluded_offsets, Ints1 proposed, Ints1 proposed_offsets,
                      const std::string &isa, int threads, Array<std::int64_t, nb::ndim<2>> ids,
                      Array<float, nb::ndim<2>> scores) {
    check_offsets(offsets, vectors.shape(0));
    check_offsets(query_offsets, queries.shape(0));
    check_offsets(excluded_offsets, excluded.shape(0));
    check_offsets(proposed_offsets, proposed.shape(0));
    const std::size_t count = query_offsets.shape(0) - 1;
    bool fits = queries.shape(1) == vectors.shape(1) && weights.shape(0) == queries.shape(0) &&
                excluded_offsets.shape(0) == count + 1 && proposed_offsets.shape(0) == count + 1 &&
                ids.shape(0) == count && scores.shape(0) == count && scores.shape(1) == ids.shape(1) &&
                offsets.shape(0) <= (std::size_t{1} << 31) - 64;
    for (std::size_t n = 0; fits && n < proposed.shape(0); ++n)
        fits = proposed(n) >= 0 && proposed(n) + 1 < static_cast<std::int64_t>(offsets.shape(0));
    if (!fits) throw nb::value_error("span_topk: shapes do not match");
    const Kernels kernels = kernels_for(Precision::fp32, isa_of(isa));
    const Batch batch{queries.data(), query_offsets.data(), weights.data(), excluded.data(), excluded_offsets.data(),
                      static_cast<std::int64_t>(count), static_cast<std::int64_t>(ids.shape(1))};
    const Rows rows{vectors.data(), offsets.data(), largest_norm};
    Statistics done;
    {
        nb::gil_scoped_release release;
        done = choose(batch, rows, static_cast<std::int64_t>(offsets.shape(0)) - 1, kernels,
                      static_cast<std::int64_t>(vectors.shape(1)), proposed.data(), proposed_offsets.data(), threads,
                      ids.data(), scores.data());
    }
    return counts(done);
}

nb::dict search(const PackedPool &packed, Floats2 vectors, Ints1 offsets, double largest_norm, Floats2 queries,
                Ints1 query_offsets, Doubles1 weights, Ints1 excluded, Ints1 excluded_offsets, const std::string &isa,
                int threads, Array<std::int64_t, nb::ndim<2>> ids, Array<float, nb::ndim<2>> scores) {
    check_offsets(offsets, vectors.shape(0));
    check_offsets(query_offsets, queries.shape(0));
    check_offsets(excluded_offsets, excluded.shape(0));
    const std::size_t count = query_offsets.shape(0) - 1;
    if (static_cast<std::int64_t>(vectors.shape(1)) != packed.dims || queries.shape(1) != vectors.shape(1) ||
        weights.shape(0) != queries.shape(0) || excluded_offsets.shape(0) != count + 1 || ids.shape(0) != count ||
        scores.shape(0) != count || scores.shape(1) != ids.shape(1) ||
        static_cast<std::int64_t>(offsets.shape(0)) != packed.sentences + 1 ||
        packed.paired != paired(packed.precision, isa_of(isa)))
        throw nb::value_error("span_topk: shapes do not match");
    const Kernels kernels = kernels_for(packed.precision, isa_of(isa));
    const Batch batch{queries.data(), query_offsets.data(), weights.data(), excluded.data(), excluded_offsets.data(),
                      static_cast<std::int64_t>(count), static_cast<std::int64_t>(ids.shape(1))};
    const Rows rows{vectors.data(), offsets.data(), largest_norm};
    Statistics done;
    {
        nb::gil_scoped_release release;
        done = run(batch, rows, packed, kernels, threads, ids.data(), scores.data());
    }
    return counts(done);
}

}  // namespace

void bind_span_topk(nb::module_ &module) {
    nb::class_<PackedPool>(module, "PackedPool", "A pool laid out for span_topk in one precision.")
        .def_prop_ro("nbytes", &PackedPool::bytes, "Memory it holds.")
        .def_prop_ro("vectors", [](const PackedPool &pool) { return pool.positions() * kLanes; },
                     "Vectors that a query span is multiplied with: what sentences share counts once, filling too.")
        .def_prop_ro("shared", [](const PackedPool &pool) { return pool.shared; }, "Vectors that sentences share.");
    module.def("span_topk_largest_norm", &longest, nb::arg("vectors"), nb::arg("threads"),
               "vectors (S, D) f32: the length of the longest; NaN if a number is not finite.");
    module.def("span_topk_pack", &pack, nb::arg("vectors"), nb::arg("offsets"), nb::arg("largest_norm"),
               nb::arg("precision"), nb::arg("isa"), nb::arg("threads"), nb::arg("share") = true,
               nb::rv_policy::take_ownership,
               "vectors (S, D) f32, offsets (N+1,) i64; precision fp32, bf16 or int8, laid out for an instruction set. share: "
               "vectors that sentences have in common are laid out once.");
    module.def("span_topk_search", &search, nb::arg("packed"), nb::arg("vectors"), nb::arg("offsets"),
               nb::arg("largest_norm"), nb::arg("queries"), nb::arg("query_offsets"), nb::arg("weights"),
               nb::arg("excluded"), nb::arg("excluded_offsets"), nb::arg("isa"), nb::arg("threads"),
               nb::arg("ids").noconvert(), nb::arg("scores").noconvert(),
               "Writes ids (B, k) i64 and scores (B, k) f32, which come padded; returns what was done, as counts.");
    module.def("span_topk_choose", &choose_among, nb::arg("vectors"), nb::arg("offsets"), nb::arg("largest_norm"),
               nb::arg("queries"), nb::arg("query_offsets"), nb::arg("weights"), nb::arg("excluded"),
               nb::arg("excluded_offsets"), nb::arg("proposed"), nb::arg("proposed_offsets"), nb::arg("isa"),
               nb::arg("threads"), nb::arg("ids").noconvert(), nb::arg("scores").noconvert(),
               "Like span_topk_search among the proposed sentences of each query.");
    module.def("span_topk_supports", [](const std::string &precision, const std::string &isa) {
        return cpu_has(isa_of(isa), precision_of(precision)) &&
               (isa != "avx2" || precision != "bf16");
    }, nb::arg("precision"), nb::arg("isa"), "Whether this CPU can screen so.");
    module.def("span_topk_peak", [](const std::string &precision, const std::string &isa) {
        nb::gil_scoped_release release;
        return peak_gops(precision_of(precision), isa_of(isa));
    }, nb::arg("precision"), nb::arg("isa"), "10^9 multiply and add operations a second of one core at most, measured.");
}

}  // namespace el4ner
