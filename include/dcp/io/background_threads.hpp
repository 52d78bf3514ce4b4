// SPDX-License-Identifier: Apache-2.0
#pragma once
// Threads that outlive the call which gave them work.

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/io/library_thread.hpp>

#include <chrono>
#include <cstddef>
#include <functional>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

#include <unistd.h>

namespace dcp {

/// The library's own threads of this process: one per job that is under way, and those of ended jobs for jobs to come. Jobs of several ranks in
/// one process wait for each other, so that none may wait for a free thread. They take no signals.
///
/// At the end of the process it waits for jobs, up to exit_deadline(), and then leaves them where they are.
template <class = Deferred>
class BackgroundThreads {
 public:
  static BackgroundThreads& instance() {
    static auto* const threads = new BackgroundThreads;   // never destroyed: threads that are left at the end may still use it
    static Farewell const farewell{*threads};
    return *threads;
  }

  /// Throws std::system_error where the system gives no thread; the job is then not begun.
  void run(std::function<void()> job) {
    std::unique_lock lock{mutex_};
    // A child of a fork has none of its parent's threads.
    if (std::exchange(process_, ::getpid()) != ::getpid()) idle_ = active_ = 0, jobs_.clear();
    jobs_.push_back(std::move(job));
    if (idle_ < jobs_.size()) {
      try {
        detail::Thread{[this] { serve(); }}.detach();
      } catch (std::system_error const&) {
        jobs_.pop_back();
        throw;
      }
    }
    ++active_;
    wake_.notify_one();
  }

  void set_exit_deadline(std::chrono::milliseconds deadline) {
    std::lock_guard const lock{mutex_};
    exit_deadline_ = deadline;
  }
  template <class = Deferred>
  std::chrono::milliseconds exit_deadline() {
    std::lock_guard const lock{mutex_};
    return exit_deadline_;
  }

 private:
  struct Farewell {
    BackgroundThreads& threads;
    ~Farewell() { threads.wait_for_jobs(); }
  };

  void serve() {
    detail::become_library_thread();
    std::unique_lock lock{mutex_};
    for (;;) {
      ++idle_;
      wake_.wait(lock, [&] { return !jobs_.empty(); });
      --idle_;
      {
        auto const job = std::move(jobs_.back());
        jobs_.pop_back();
        lock.unlock();
        job();
      }
      lock.lock();
      --active_;
      ended_.notify_all();
    }
  }
  void wait_for_jobs() {
    std::unique_lock lock{mutex_};
    ended_.wait_for(lock, exit_deadline_, [&] { return active_ == 0 || process_ != ::getpid(); });
  }

  detail::Mutex mutex_;
  detail::Condition wake_, ended_;
  std::vector<std::function<void()>> jobs_;
  std::size_t idle_ = 0, active_ = 0;   // active: waiting or running
  std::chrono::milliseconds exit_deadline_ = std::chrono::seconds{60};
  pid_t process_ = ::getpid();
};

}  // namespace dcp
