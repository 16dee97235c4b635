// span_topk, threads: a team that lives as long as a call and does one list of tasks after another.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace el4ner::topk {

// The caller's thread and up to threads - 1 others, fewer where the system grants no more.
class Team {
  public:
    explicit Team(std::int64_t threads) {
        others_.reserve(static_cast<std::size_t>(std::max<std::int64_t>(threads - 1, 0)));
        for (std::int64_t number = 1; number < threads; ++number) {
            try {
                others_.emplace_back([this, number] { wait_for_work(static_cast<int>(number)); });
            } catch (const std::system_error &) {
                break;  // no more threads to be had: those that run do the work
            }
        }
    }
    ~Team() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            closed_ = true;
        }
        begin_.notify_all();
        for (std::thread &other : others_) other.join();
    }
    Team(const Team &) = delete;
    Team &operator=(const Team &) = delete;

    int size() const { return static_cast<int>(others_.size()) + 1; }

    // Runs work(task, worker) for each task below `tasks`, in order but side by side; 0 <= worker < size(). Returns when
    // all are done; the first exception goes to the caller.
    template <typename Work>
    void each(std::int64_t tasks, const Work &work) {
        if (others_.empty() || tasks <= 1) {
            for (std::int64_t task = 0; task < tasks; ++task) work(task, 0);
            return;
        }
        const auto call = [](const void *context, std::int64_t task, int worker) {
            (*static_cast<const Work *>(context))(task, worker);
        };
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            call_ = call;
            context_ = &work;
            tasks_ = tasks;
            next_ = 0;
            busy_ = static_cast<int>(others_.size());
            ++round_;
        }
        begin_.notify_all();
        take_tasks(0);
        std::unique_lock<std::mutex> lock(mutex_);
        end_.wait(lock, [this] { return busy_ == 0; });
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }

    // The same in runs of `grain` consecutive numbers below `count`: work(begin, end).
    template <typename Work>
    void runs(std::int64_t count, std::int64_t grain, const Work &work) {
        each((count + grain - 1) / grain,
             [&](std::int64_t run, int) { work(run * grain, std::min(count, (run + 1) * grain)); });
    }

  private:
    std::vector<std::thread> others_;
    std::mutex mutex_;
    std::condition_variable begin_, end_;
    // Of the present list of tasks; changed under the mutex while nobody is busy.
    void (*call_)(const void *, std::int64_t, int) = nullptr;
    const void *context_ = nullptr;
    std::int64_t tasks_ = 0, round_ = 0;
    std::atomic<std::int64_t> next_{0};
    int busy_ = 0;
    bool closed_ = false;
    std::exception_ptr error_;

    void take_tasks(int worker) {
        try {
            for (std::int64_t task = next_++; task < tasks_; task = next_++) call_(context_, task, worker);
        } catch (...) {
            next_ = tasks_;
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }

    void wait_for_work(int worker) {
        for (std::int64_t seen = 0;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                begin_.wait(lock, [&] { return closed_ || round_ != seen; });
                if (round_ == seen) return;  // closed
                seen = round_;
            }
            take_tasks(worker);
            const std::lock_guard<std::mutex> lock(mutex_);
            if (--busy_ == 0) end_.notify_one();
        }
    }
};

// Runs work(task) for each task below `tasks` on several threads; the first exception goes to the caller.
template <typename Work>
void parallel(std::int64_t tasks, int threads, const Work &work) {
    Team team(std::min<std::int64_t>(threads, tasks));
    team.each(tasks, [&](std::int64_t task, int) { work(task); });
}

}  // namespace el4ner::topk
