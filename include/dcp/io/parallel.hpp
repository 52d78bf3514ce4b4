// SPDX-License-Identifier: Apache-2.0
#pragma once
// Work items on a few threads, the caller's among them.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace dcp {

/// Calls work(thread, item) for items [0, count), on `threads` threads: numbers 1 and up are new threads, 0 is the caller. The caller
/// calls meanwhile() between its items and while it waits, for what only its thread may do (MPI).
///
/// Throws    the first exception of any item; items that have not begun are then dropped
template <class Work, class Meanwhile>
void parallel_for(std::size_t threads, std::size_t count, Work work, Meanwhile meanwhile) {
  if (threads > count) threads = count;
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  std::exception_ptr failure;
  std::size_t running = threads > 1 ? threads - 1 : 0;
  auto const run = [&](std::size_t thread) noexcept {
    for (;;) {
      std::size_t const item = next.fetch_add(1);
      if (item >= count) return;
      try {
        work(thread, item);
        if (thread == 0) meanwhile();
      } catch (...) {
        std::lock_guard const lock{mutex};
        if (!failure) failure = std::current_exception();
        next = count;
      }
    }
  };
  std::vector<std::thread> others;
  try {
    for (std::size_t t = 1; t < threads; ++t)
      others.emplace_back([&, t] {
        run(t);
        std::lock_guard const lock{mutex};
        --running;
        finished.notify_one();
      });
  } catch (...) {
    // The system gives no more threads: those that run, and this one, do the work.
    std::lock_guard const lock{mutex};
    running -= threads - 1 - others.size();
  }
  run(0);
  std::unique_lock lock{mutex};
  while (!finished.wait_for(lock, std::chrono::milliseconds{50}, [&] { return running == 0; })) {
    lock.unlock();
    try {
      meanwhile();
    } catch (...) {
      std::lock_guard const again{mutex};
      if (!failure) failure = std::current_exception();
    }
    lock.lock();
  }
  lock.unlock();
  for (auto& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace dcp
