// SPDX-License-Identifier: Apache-2.0
#pragma once
// Jobs on threads of their own, while the caller's thread goes on with what only it may do (MPI).

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/io/library_thread.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

namespace dcp {

/// A few threads and a queue of jobs. Where the system gives no thread at all, jobs run on the caller's, when they are handed over.
///
/// Errors    the first exception of a job is kept, and jobs that have not begun are dropped; finish() throws it
template <class = Deferred>
class Workers {
 public:
  /// A job is told the number of its thread, from 0: two jobs with the same number never run at once.
  using Job = std::function<void(std::size_t thread)>;

  explicit Workers(std::size_t threads) {
    try {
      threads_.reserve(threads);
      for (std::size_t t = 0; t < threads; ++t) threads_.emplace_back([this, t] { run(t); });
    } catch (std::system_error const&) {
      // Fewer threads than wanted do the work too.
    }
  }
  Workers(Workers const&) = delete;
  Workers& operator=(Workers const&) = delete;
  /// Drops jobs that have not begun, and waits for those that have.
  ~Workers() {
    {
      std::lock_guard const lock{mutex_};
      stop_ = true;
      drop();
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  std::size_t threads() const { return std::max<std::size_t>(1, threads_.size()); }

  /// Hands over a job. `urgent`: before all that wait, for jobs that hold memory.
  void submit(Job job, bool urgent = false) {
    if (threads_.empty()) {
      ++unfinished_;
      attempt(job, 0);
      return;
    }
    {
      std::lock_guard const lock{mutex_};
      if (failure_) return;
      ++unfinished_;
      (urgent ? urgent_ : jobs_).push_back(std::move(job));
    }
    wake_.notify_one();
  }

  /// Waits until all jobs have ended, with calls of meanwhile() at least every 50 ms. Throws the first exception of any, or of meanwhile.
  template <class Meanwhile>
  void finish(Meanwhile meanwhile) {
    wait_until([] { return false; }, meanwhile);
  }
  /// The same, but returns as soon as done() is true; it is asked whenever a job has ended.
  template <class Done, class Meanwhile>
  void wait_until(Done done, Meanwhile meanwhile) {
    std::unique_lock lock{mutex_};
    while (unfinished_ > 0 && (failure_ || !done())) {
      lock.unlock();
      try {
        meanwhile();
      } catch (...) {
        std::lock_guard const again{mutex_};
        fail(std::current_exception());
      }
      lock.lock();
      ended_.wait_for(lock, std::chrono::milliseconds{50}, [&] { return unfinished_ == 0 || (!failure_ && done()); });
    }
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  void run(std::size_t thread) {
    detail::become_library_thread();
    std::unique_lock lock{mutex_};
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || waiting() > 0; });
      if (waiting() == 0) return;
      Job const job = take();
      lock.unlock();
      attempt(job, thread);
      lock.lock();
    }
  }
  void attempt(Job const& job, std::size_t thread) {
    std::exception_ptr failure;
    try {
      job(thread);
    } catch (...) {
      failure = std::current_exception();
    }
    std::lock_guard const lock{mutex_};
    if (failure) fail(std::move(failure));
    --unfinished_;
    ended_.notify_all();
  }
  // With the lock held.
  void fail(std::exception_ptr failure) {
    if (!failure_) failure_ = std::move(failure);   // this thread keeps no hold on what another may destroy
    unfinished_ -= waiting();
    drop();
  }
  std::size_t waiting() const { return urgent_.size() + jobs_.size() - next_; }
  Job take() {
    Job job;
    if (!urgent_.empty()) {
      job = std::move(urgent_.back());
      urgent_.pop_back();
      return job;
    }
    job = std::move(jobs_[next_++]);
    if (next_ == jobs_.size()) jobs_.clear(), next_ = 0;
    return job;
  }
  void drop() {
    urgent_.clear();
    jobs_.clear();
    next_ = 0;
  }

  detail::Mutex mutex_;
  detail::Condition wake_, ended_;
  std::vector<Job> urgent_, jobs_;
  std::size_t next_ = 0;         // of jobs_
  std::size_t unfinished_ = 0;   // waiting or running
  std::exception_ptr failure_;
  bool stop_ = false;
  std::vector<detail::Thread> threads_;
};

}  // namespace dcp
