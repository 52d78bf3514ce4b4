// SPDX-License-Identifier: Apache-2.0
#pragma once
// In the place of include/dcp/base/threading.hpp: what the library takes for threads is run by tests/schedules/scheduler.hpp.

#include "../../scheduler.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <type_traits>
#include <utility>

namespace dcp::detail {

struct SteadyClock {
  using duration = std::chrono::nanoseconds;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = std::chrono::time_point<SteadyClock>;
  static constexpr bool is_steady = true;
  static time_point now() noexcept {
    auto const* const scheduler = test::schedules::Scheduler::here();
    return time_point{duration{scheduler != nullptr ? scheduler->now() : 0}};
  }
};

class Mutex {
 public:
  constexpr Mutex() noexcept = default;
  Mutex(Mutex const&) = delete;
  void lock() {
    test::schedules::Unseen const unseen;
    if (auto* const scheduler = test::schedules::Scheduler::here()) scheduler->lock(state_, "lock a mutex");
  }
  void unlock() {
    test::schedules::Unseen const unseen;
    if (auto* const scheduler = test::schedules::Scheduler::here()) scheduler->unlock(state_);
  }

 private:
  friend class Condition;
  test::schedules::MutexState state_;
};

class Condition {
 public:
  void notify_one() noexcept { notify(false); }
  void notify_all() noexcept { notify(true); }
  void wait(std::unique_lock<Mutex>& lock) { wait_until_time(lock, test::schedules::never); }
  template <class Predicate>
  void wait(std::unique_lock<Mutex>& lock, Predicate predicate) {
    while (!predicate()) wait(lock);
  }
  std::cv_status wait_until(std::unique_lock<Mutex>& lock, SteadyClock::time_point until) {
    return wait_until_time(lock, until.time_since_epoch().count()) ? std::cv_status::no_timeout : std::cv_status::timeout;
  }
  template <class Predicate>
  bool wait_until(std::unique_lock<Mutex>& lock, SteadyClock::time_point until, Predicate predicate) {
    while (!predicate())
      if (wait_until(lock, until) == std::cv_status::timeout) {
        bool const holds = predicate();
        test::schedules::Unseen const unseen;
        if (holds) test::schedules::Scheduler::here()->could_have_gone_on();
        return holds;
      }
    return true;
  }
  template <class Rep, class Period, class Predicate>
  bool wait_for(std::unique_lock<Mutex>& lock, std::chrono::duration<Rep, Period> time, Predicate predicate) {
    return wait_until(lock, SteadyClock::now() + time, std::move(predicate));
  }

 private:
  bool wait_until_time(std::unique_lock<Mutex>& lock, test::schedules::Nanoseconds until) {
    test::schedules::Unseen const unseen;
    return test::schedules::Scheduler::here()->wait(state_, lock.mutex()->state_, until);
  }
  void notify(bool all) noexcept {
    test::schedules::Unseen const unseen;
    if (auto* const scheduler = test::schedules::Scheduler::here()) scheduler->notify(state_, all);
  }
  test::schedules::ConditionState state_;
};

class Thread {
 public:
  Thread() noexcept = default;
  template <class F, class... Args>
    requires(!std::is_same_v<std::remove_cvref_t<F>, Thread>)
  explicit Thread(F&& f, Args&&... args) {
    std::function<void()> body = [f = std::forward<F>(f), ... args = std::forward<Args>(args)]() mutable { f(args...); };
    test::schedules::Unseen const unseen;
    auto& scheduler = *test::schedules::Scheduler::here();
    scheduler.point(false, "begin a thread");
    task_ = scheduler.create(std::move(body));
  }
  Thread(Thread&& other) noexcept : task_{std::exchange(other.task_, nullptr)} {}
  Thread& operator=(Thread&& other) noexcept {
    if (joinable()) std::terminate();
    task_ = std::exchange(other.task_, nullptr);
    return *this;
  }
  ~Thread() {
    if (joinable()) std::terminate();
  }
  bool joinable() const noexcept { return task_ != nullptr; }
  void join() {
    test::schedules::Unseen const unseen;
    test::schedules::Scheduler::here()->join(*std::exchange(task_, nullptr));
  }
  void detach() { task_ = nullptr; }
  static unsigned hardware_concurrency() noexcept { return 2; }

 private:
  test::schedules::Task* task_ = nullptr;
};

/// Every access is a point.
template <class T>
class Atomic {
 public:
  constexpr Atomic() noexcept = default;
  constexpr Atomic(T value) noexcept : value_{value} {}
  Atomic(Atomic const&) = delete;
  Atomic& operator=(Atomic const&) = delete;

  T load(std::memory_order order = std::memory_order_seq_cst) const { return read(), value_.load(order); }
  void store(T value, std::memory_order order = std::memory_order_seq_cst) { write(), value_.store(value, order); }
  T exchange(T value, std::memory_order order = std::memory_order_seq_cst) { return write(), value_.exchange(value, order); }
  T fetch_add(T value, std::memory_order order = std::memory_order_seq_cst) { return write(), value_.fetch_add(value, order); }
  T fetch_sub(T value, std::memory_order order = std::memory_order_seq_cst) { return write(), value_.fetch_sub(value, order); }
  operator T() const { return load(); }
  T operator=(T value) { return store(value), value; }
  T operator++() { return static_cast<T>(fetch_add(1) + 1); }
  T operator--() { return static_cast<T>(fetch_sub(1) - 1); }
  T operator++(int) { return fetch_add(1); }
  T operator--(int) { return fetch_sub(1); }
  T operator+=(T value) { return static_cast<T>(fetch_add(value) + value); }
  T operator-=(T value) { return static_cast<T>(fetch_sub(value) - value); }

 private:
  void read() const {
    test::schedules::Unseen const unseen;
    if (auto* const scheduler = test::schedules::Scheduler::here()) scheduler->read(state_);
  }
  void write() {
    test::schedules::Unseen const unseen;
    if (auto* const scheduler = test::schedules::Scheduler::here()) scheduler->write(state_);
  }
  std::atomic<T> value_{};
  mutable test::schedules::AtomicState state_;
};

namespace this_thread {
inline void yield() noexcept {
  test::schedules::Unseen const unseen;
  auto& scheduler = *test::schedules::Scheduler::here();
  scheduler.sleep(scheduler.now(), "yield");
}
inline void sleep_until(SteadyClock::time_point until) {
  test::schedules::Unseen const unseen;
  test::schedules::Scheduler::here()->sleep(until.time_since_epoch().count(), "sleep");
}
template <class Rep, class Period>
void sleep_for(std::chrono::duration<Rep, Period> time) {
  sleep_until(SteadyClock::now() + time);
}
}  // namespace this_thread

}  // namespace dcp::detail
