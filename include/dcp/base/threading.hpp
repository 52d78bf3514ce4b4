// SPDX-License-Identifier: Apache-2.0
#pragma once
// Everything by which threads of the library meet, wait and tell the time. There are no other mutexes, condition variables, threads and clocks in
// it, so that whoever finds another header of this name first in the include path decides what runs when: tests/schedules does so, and tries
// every order of a save and what happens beside it.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace dcp::detail {

using Mutex = std::mutex;   // with std::lock_guard and std::unique_lock
using Condition = std::condition_variable;
using Thread = std::thread;
using SteadyClock = std::chrono::steady_clock;
template <class T>
using Atomic = std::atomic<T>;
namespace this_thread = std::this_thread;

}  // namespace dcp::detail
