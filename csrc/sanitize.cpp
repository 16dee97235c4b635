// A driver for address and undefined-behaviour sanitizers (make sanitize): every kernel on exactly sized heap arrays,
// at sizes around the widths of registers, on every instruction set this processor has. What sanitizers find ends the
// run; values are the Python tests' business, here only the agreement of the instruction sets is looked at.
#include <cstdio>
#include <random>

#include "choice_logprobs.hpp"
#include "peak.hpp"
#include "span_scores.hpp"
#include "vote.hpp"

namespace {

std::mt19937 random_bits(0);

std::vector<float> floats(std::int64_t count, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> out(static_cast<std::size_t>(count));
    for (float &one : out) one = normal(random_bits);
    return out;
}

int failures = 0;

void expect(bool right, const char *what, const char *set) {
    if (right) return;
    ++failures;
    std::printf("FAILED: %s on %s\n", what, set);
}

void votes(const char *set) {
    for (std::int64_t members : {0, 1, 2, 3, 7, 8, 9})
        for (std::int64_t labels : {1, 2, 7, 8, 15, 16, 17, 33})
            for (std::int64_t spans : {0, 1, 7, 31, 33})
                for (bool hard : {false, true}) {
                    std::vector<float> logp = floats(members * spans * labels, 3.0f);
                    for (float &one : logp) one = -std::fabs(one);
                    for (std::int64_t row = 0; row < members * spans; ++row)  // some abstain, on span 3 everybody
                        for (std::int64_t l = 0; l < labels && (row % 5 == 0 || row % spans == 3); ++l)
                            logp[static_cast<std::size_t>(row * labels + l)] = NAN;
                    std::vector<double> weights(static_cast<std::size_t>(members * labels), 0.5);
                    const auto size = static_cast<std::size_t>(spans);
                    std::vector<std::int64_t> winners(size), plain_winners(size);
                    std::vector<float> scores(size), margins(size);
                    el4ner::VoteCall call{logp.data(), weights.data(),  members, spans,
                                          labels,      hard,            winners.data(), scores.data(),
                                          margins.data()};
                    expect(el4ner::vote(call, 2), "vote accepts its rows", set);
                    call.winners = plain_winners.data();
                    el4ner::vote_spans(call, 0, spans);
                    expect(winners == plain_winners, "vote", set);
                    if (members * spans == 0) continue;
                    for (std::int64_t l : {std::int64_t{0}, labels - 1}) {
                        float &one = logp[logp.size() - static_cast<std::size_t>(labels - l)];
                        const float was = one;
                        one = std::isnan(was) ? -1.0f : NAN;
                        expect(labels == 1 || !el4ner::vote(call, 1), "vote refuses rows that are partly NaN", set);
                        one = was;
                    }
                    logp[0] = std::numeric_limits<float>::infinity();
                    expect(!el4ner::vote(call, 1), "vote refuses infinity", set);
                }
}

void spans(const char *set) {
    for (std::int64_t tokens : {0, 1, 31, 33})
        for (std::int64_t labels : {1, 8, 17})
            for (std::int64_t length : {1, 7, 40}) {
                const std::vector<float> mean = floats(tokens * labels, 1.0f), last = floats(tokens * labels, 1.0f);
                std::vector<float> out(static_cast<std::size_t>(tokens * length * labels));
                el4ner::span_scores({mean.data(), last.data(), tokens, length, labels, out.data()}, 3);
                std::vector<std::int64_t> taken(static_cast<std::size_t>(tokens)), label(taken);
                expect(el4ner::best_flat(out.data(), tokens, length, labels, labels - 1, taken.data(), label.data()),
                       "best_flat accepts its scores", set);
            }
}

void logprobs(const char *set) {
    for (std::int64_t rows : {0, 1, 13, 15, 29})
        for (std::int64_t width : {0, 1, 5, 32, 33, 70, 300})
            for (std::int64_t vocabulary : {1, 31, 33, 512, 545})
                for (bool bf16 : {false, true}) {
                    const std::vector<float> hidden = floats(rows * width, 1.0f);
                    const std::vector<float> head = floats(vocabulary * width, 0.3f), bias = floats(vocabulary, 1.0f);
                    std::vector<std::uint16_t> hidden_bits(hidden.size()), head_bits(head.size());
                    for (std::size_t i = 0; i < hidden.size(); ++i)
                        std::memcpy(&hidden_bits[i], reinterpret_cast<const char *>(&hidden[i]) + 2, 2);
                    for (std::size_t i = 0; i < head.size(); ++i)
                        std::memcpy(&head_bits[i], reinterpret_cast<const char *>(&head[i]) + 2, 2);
                    std::vector<double> total(static_cast<std::size_t>(rows)), plain(total);
                    el4ner::HeadCall call{bf16 ? static_cast<const void *>(hidden_bits.data()) : hidden.data(),
                                          bf16 ? static_cast<const void *>(head_bits.data()) : head.data(),
                                          bf16, rows, width, vocabulary, bias.data(), 0.5f, 4.0f, total.data()};
                    el4ner::choice_log_totals(call, 2);
                    call.log_total = plain.data();
                    el4ner::log_totals<el4ner::PortableHead>(call, 1);
                    for (std::size_t r = 0; r < total.size(); ++r)  // float32 sums in other orders
                        expect(std::fabs(total[r] - plain[r]) < 1e-4, "choice_logprobs", set);
                }
}

}  // namespace

int main() {
    for (const char *set : {"portable", "avx2", "avx512", "avx512_bf16", "widest"}) {
        setenv("EL4NER_ISA", set, 1);
        votes(set);
        spans(set);
        logprobs(set);
        std::printf("%s: runs as instruction set %d\n", set, static_cast<int>(el4ner::instruction_set()));
    }
    std::printf("%s\n", failures == 0 ? "no findings" : "findings");
    return failures == 0 ? 0 : 1;
}
