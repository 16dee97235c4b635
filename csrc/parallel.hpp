// A loop cut into contiguous parts, one for each thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace el4ner {

// run(begin, end) for consecutive parts of [0, count). A thread gets at least `grain`, since starting one costs about
// 30 microseconds; the caller's own thread takes the last part. `run` must not throw.
template <typename Run>
void in_parallel(std::int64_t count, std::int64_t grain, std::int64_t threads, const Run &run) {
    const std::int64_t useful = std::min(threads, count / std::max<std::int64_t>(grain, 1));
    if (useful <= 1) {
        run(std::int64_t{0}, count);
        return;
    }
    std::vector<std::thread> others;
    others.reserve(static_cast<std::size_t>(useful - 1));
    std::int64_t begin = 0;
    for (std::int64_t part = 1; part < useful; ++part) {
        const std::int64_t end = count * part / useful;
        try {
            others.emplace_back([&run, begin, end] { run(begin, end); });
        } catch (...) {  // no more threads to be had: the caller does the part itself
            run(begin, end);
        }
        begin = end;
    }
    run(begin, count);
    for (std::thread &other : others) other.join();
}

}  // namespace el4ner
