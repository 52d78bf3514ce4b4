// SPDX-License-Identifier: Apache-2.0
#pragma once
// A deterministic executor, and a search over what it may do.
//
// Threads are contexts on one thread of the system. They change at points only: where a mutex is taken, a condition waited for or told, an
// atomic touched, a thread begun or joined, and where a test says step(). At each point there is a task that the executor runs by itself (the one that
// runs, as long as it can; then the next in number), and others: the other tasks that can run, the one whose time is up next, and what a test lets fail.
// Each of the others is a deviation. Time is a number: it moves when nobody can run, to the earliest deadline, or as a deviation, if that is near.
//
// The search takes every deviation at every point, up to a number of deviations per schedule, by fork(): the child takes it, the parent waits for
// the child and goes on. So a schedule costs what is new in it. A state is known by its history: each event mixes the histories of its task and
// of what it touches, and a state is the sum of its events, so that two orders of independent events are one state. A schedule that comes to a state from
// which everything has been tried ends there.
//
// What ends a search: a test that says fail(), a task that waits for ever, a wait that went on because of its time alone though it could have gone on
// before, a signal, a sanitizer. The list of deviations is printed and can be run again.
//
// The bounds: atomics are as if all were sequentially consistent; notify_one tells whoever waits longest; a wait never ends for no reason.

#include "support/campaign.hpp"

#include <cxxabi.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define DCP_TEST_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define DCP_TEST_TSAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DCP_TEST_ASAN 1
#elif __has_feature(thread_sanitizer)
#define DCP_TEST_TSAN 1
#endif
#endif

#if DCP_TEST_ASAN
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, void const* bottom, std::size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, void const** bottom, std::size_t* size);
#endif
#if DCP_TEST_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(char const* file, int line);
void AnnotateIgnoreReadsEnd(char const* file, int line);
void AnnotateIgnoreWritesBegin(char const* file, int line);
void AnnotateIgnoreWritesEnd(char const* file, int line);
}
#endif

namespace dcp::test {

/// What is tried. A deviation is anything that the executor would not do by itself.
struct Bounds {
  int deviations = 1;
  bool everywhere = true;   // false: at steps, beginnings of threads and where a task waits, but not at mutexes, conditions and atomics that are free
};

/// How a search went.
struct Found {
  std::uint64_t schedules = 0;   // that were run to their end
  std::uint64_t cut = 0;         // that came to a state which was known
  std::uint64_t distinct = 0;    // of those run to their end: partial orders of events
  std::uint64_t states = 0;
  std::uint64_t points = 0;      // of the schedule without deviations
  std::string failure;           // what was found, with the deviations that lead to it; empty: nothing
};

namespace schedules {

inline std::uint64_t mix(std::uint64_t a, std::uint64_t b) {   // splitmix64
  std::uint64_t z = a * 0x9e3779b97f4a7c15 + b + 0x632be59bd9b4e019;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

using Nanoseconds = std::int64_t;
inline constexpr Nanoseconds never = INT64_MAX;

enum class Wait : std::uint8_t { none, lock, condition, join, time, choice, ended };

struct Task;

// What the primitives of threading.hpp hold.
struct MutexState {
  Task* owner = nullptr;
  std::uint64_t history = 0;
};
struct ConditionState {
  std::uint64_t history = 0;
};
struct AtomicState {
  std::uint64_t history = 0, reads = 0;
};

struct Context {
  ucontext_t registers;
  struct Exceptions {   // __cxa_eh_globals, per thread of the system
    void* caught;
    unsigned uncaught;
  } exceptions{nullptr, 0};
  void const* bottom = nullptr;
  std::size_t size = 0;
  void* sanitizer = nullptr;
};

struct Task {
  int number;
  std::function<void()> body;
  Context context;
  Wait wait = Wait::none;
  bool fine = false;                 // at a point that is no step
  MutexState* mutex = nullptr;       // to be taken
  ConditionState* condition = nullptr;
  Task* joined = nullptr;
  int choices = 0, chosen = 0;
  Nanoseconds deadline = never;
  std::uint64_t since = 0;           // when it began to wait, as a count
  bool timed_out = false, quiet = false;   // by its deadline; when nobody else could run
  bool detached = false;
  std::uint64_t history;
  char const* doing = "begins";

  bool can_run() const {
    switch (wait) {
      case Wait::none:
      case Wait::choice: return true;
      case Wait::lock: return mutex->owner == nullptr;
      case Wait::join: return joined->wait == Wait::ended;
      default: return false;
    }
  }
};

/// Between the processes of one search.
struct Shared {
  struct Deviation {
    std::uint32_t point, alternative;
  };
  std::uint64_t schedules, cut, distinct, states, points;
  std::uint32_t deviations;
  Deviation deviation[4096];
  char failure[16384];

  std::uint64_t slots;     // a power of two: what does not fit is not known, and is tried again
  std::uint64_t* table() { return reinterpret_cast<std::uint64_t*>(this + 1); }

  /// False if it was there. A full table knows nothing new, and the search goes on without it.
  bool add(std::uint64_t key) {
    key |= 1;
    for (std::uint64_t i = 0; i < 64; ++i) {
      auto& slot = table()[(mix(key, 7) + i) % slots];
      if (slot == key) return false;
      if (slot == 0) return slot = key, true;
    }
    return true;
  }
  bool has(std::uint64_t key) {
    key |= 1;
    for (std::uint64_t i = 0; i < 64; ++i) {
      auto const slot = table()[(mix(key, 7) + i) % slots];
      if (slot == key) return true;
      if (slot == 0) return false;
    }
    return false;
  }
};

/// What the executor does is no race: it is what stands for the system's own threads.
class Unseen {
 public:
#if DCP_TEST_TSAN
  Unseen() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Unseen() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#else
  Unseen() {}
#endif
  Unseen(Unseen const&) = delete;
};
inline void happens_before([[maybe_unused]] void* what) {
#if DCP_TEST_TSAN
  __tsan_release(what);
#endif
}
inline void happens_after([[maybe_unused]] void* what) {
#if DCP_TEST_TSAN
  __tsan_acquire(what);
#endif
}

/// At once, with nothing of what a process does at its end.
[[noreturn]] inline void leave_process(int status) {
  ::syscall(SYS_exit_group, status);
  std::abort();
}

enum class Mode : std::uint8_t { search, random, replay };

class Scheduler {
 public:
  /// Of this process; nothing outside of a schedule.
  static Scheduler*& here() {
    static Scheduler* one = nullptr;
    return one;
  }

  Scheduler(Shared& shared, Bounds bounds, Mode mode, std::uint64_t seed) : shared_{shared}, bounds_{bounds}, left_{bounds.deviations}, mode_{mode}, random_{seed}, salt_{mix(static_cast<std::uint64_t>(bounds.deviations), bounds.everywhere ? 1 : 0)} {}

  /// Runs `body` and the threads that it begins until none of them can do anything any more; then the process ends.
  [[noreturn]] void run(std::function<void()> body) {
    Unseen const unseen;
    here() = this;
    ::prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);   // a fork copies what is written to: pages, and not 2 MiB of them
    rlimit const minutes{120, 120};
    ::setrlimit(RLIMIT_CPU, &minutes);   // of each process, for a task that comes to no point any more
    for (int const signal : {SIGINT, SIGILL, SIGFPE, SIGSEGV, SIGTERM, SIGABRT}) std::signal(signal, SIG_DFL);   // what doctest would say is said by the parent
#if DCP_TEST_TSAN
    main_.sanitizer = __tsan_get_current_fiber();
#endif
    current_ = create(std::move(body));
    loop();
  }

  // Called by tasks.
  Nanoseconds now() const { return now_; }
  Task* current() const { return current_; }
  Task* create(std::function<void()> body) {
    if (current_ != nullptr) event(current_->history);
    auto task = std::make_unique<Task>();
    task->number = static_cast<int>(tasks_.size());
    task->body = std::move(body);
    task->history = mix(current_ != nullptr ? current_->history : 1, 3);
    auto& context = task->context;
    context.size = stack_bytes;
    void* const stack = ::mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) std::abort();
    ::mprotect(stack, 4096, PROT_NONE);
    context.bottom = stack;
    ::getcontext(&context.registers);
    context.registers.uc_stack = {stack, 0, stack_bytes};
    context.registers.uc_link = nullptr;
    ::makecontext(&context.registers, &Scheduler::enter, 0);
#if DCP_TEST_TSAN
    context.sanitizer = __tsan_create_fiber(0);
#endif
    happens_before(task.get());
    tasks_.push_back(std::move(task));
    return tasks_.back().get();
  }
  /// Others may run now.
  void point(bool fine, char const* doing) {
    current_->wait = Wait::none;
    give_way(fine, doing);
  }
  void lock(MutexState& mutex, char const* doing, bool fine = true) {
    current_->wait = Wait::lock, current_->mutex = &mutex;
    give_way(fine, doing);
    take(mutex);
  }
  void unlock(MutexState& mutex) {
    if (mutex.owner != current_) fail("a mutex is given back by a thread that has not taken it");
    happens_before(&mutex);
    mutex.owner = nullptr;
  }
  /// Until it is told, or until `deadline`: false then.
  bool wait(ConditionState& condition, MutexState& mutex, Nanoseconds deadline) {
    point(true, "wait for a condition");
    event(condition.history);
    unlock(mutex);
    Task& me = *current_;
    me.wait = Wait::condition, me.condition = &condition, me.mutex = &mutex, me.deadline = deadline, me.since = ++count_, me.timed_out = me.quiet = false;
    give_way(false, "wait for a condition");
    take(mutex);
    return !me.timed_out;
  }
  void notify(ConditionState& condition, bool all) {
    point(true, all ? "notify all" : "notify one");
    event(condition.history);
    for (;;) {
      Task* first = nullptr;
      for (auto const& task : tasks_)
        if (task->wait == Wait::condition && task->condition == &condition && (first == nullptr || task->since < first->since)) first = task.get();
      if (first == nullptr) return;
      first->wait = Wait::lock, first->deadline = never;
      if (!all) return;
    }
  }
  /// The wait that has just ended by its deadline would have gone on: nobody told it.
  void could_have_gone_on() {
    if (current_->quiet) fail("a wait ended by its time alone, though what it waited for was there: nobody told it");
  }
  void sleep(Nanoseconds deadline, char const* doing) {
    Task& me = *current_;
    me.wait = Wait::time, me.deadline = deadline;
    give_way(false, doing);
    event(me.history);
  }
  void join(Task& task) {
    current_->wait = Wait::join, current_->joined = &task;
    give_way(true, "join a thread");
    event(task.history);
    happens_after(&task);
  }
  void read(AtomicState& atomic) {
    point(true, "read an atomic");
    atomic.reads += event_with(atomic.history);
  }
  void write(AtomicState& atomic) {
    point(true, "write an atomic");
    atomic.history += atomic.reads, atomic.reads = 0;
    event(atomic.history);
  }
  /// 0, unless a deviation says another number below `choices`.
  int choose(int choices, char const* doing) {
    if (quiet_) return 0;
    current_->wait = Wait::choice, current_->choices = choices, current_->chosen = 0;
    give_way(false, doing);
    std::uint64_t history = static_cast<std::uint64_t>(current_->chosen);
    event(history);
    return current_->chosen;
  }
  /// From now on, or until it is set to false, nothing is tried: of what a test looks at after a schedule.
  void quiet(bool quiet) { quiet_ = quiet; }
  /// A step of the test.
  void step(std::string text) {
    point(false, "a step");
    event(current_->history);
    notes_.push_back("thread " + std::to_string(current_->number) + ": " + std::move(text));
  }

  [[noreturn]] void fail(std::string const& what) {
    std::string text = what + "\n  deviations: " + deviations_in_words(shared_) + "\n";
    for (auto const& task : tasks_)
      if (task->wait != Wait::ended) text += "  thread " + std::to_string(task->number) + (task.get() == current_ ? " (runs)" : "") + ": " + task->doing + "\n";
    text += "  at " + std::to_string(now_ / 1000000) + " ms, after:\n";
    for (std::size_t i = notes_.size() - std::min<std::size_t>(notes_.size(), 40); i < notes_.size(); ++i) text += "    " + notes_[i] + "\n";
    std::snprintf(shared_.failure, sizeof shared_.failure, "%s", text.c_str());
    if (mode_ == Mode::replay)
      for (auto const& note : notes_) std::fprintf(stderr, "%s\n", note.c_str());
    leave_process(1);
  }
  static std::string deviations_in_words(Shared const& shared) {
    std::string text;
    for (std::uint32_t i = 0; i < std::min<std::uint32_t>(shared.deviations, 4096); ++i) text += (i > 0 ? "," : "") + std::to_string(shared.deviation[i].point) + ":" + std::to_string(shared.deviation[i].alternative);
    return text.empty() ? "none" : text;
  }

  std::vector<Shared::Deviation> replayed;   // of Mode::replay

 private:
#if DCP_TEST_ASAN || DCP_TEST_TSAN
  static constexpr std::size_t stack_bytes = 2 << 20;
#else
  static constexpr std::size_t stack_bytes = 256 << 10;
#endif
  struct Alternative {
    Task* task;
    bool by_time;
  };

  static void enter() {
    Scheduler& scheduler = *here();
    Task& me = *scheduler.current_;
#if DCP_TEST_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.main_.bottom, &scheduler.main_.size);
#endif
    happens_after(&me);
    try {
      me.body();
    } catch (std::exception const& error) {
      scheduler.fail("an exception left a thread: " + std::string{error.what()});
    } catch (...) {
      scheduler.fail("an exception left a thread");
    }
    me.body = nullptr;
    happens_before(&me);
    Unseen const unseen;
    scheduler.event(me.history);
    me.wait = Wait::ended;
    scheduler.leave(me, true);
    std::abort();
  }

  // Between a task and the loop.
  void change([[maybe_unused]] Context& from, Context& to, [[maybe_unused]] bool last) {
    auto& globals = *reinterpret_cast<Context::Exceptions*>(abi::__cxa_get_globals());
    from.exceptions = globals;
    globals = to.exceptions;
#if DCP_TEST_ASAN
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, to.bottom, to.size);
#endif
#if DCP_TEST_TSAN
    __tsan_switch_to_fiber(to.sanitizer, 1);
#endif
    ::swapcontext(&from.registers, &to.registers);
#if DCP_TEST_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }
  void leave(Task& me, bool last = false) { change(me.context, main_, last); }
  void give_way(bool fine, char const* doing) {
    Task& me = *current_;
    me.fine = fine, me.doing = doing;
    leave(me);
    me.wait = Wait::none, me.deadline = never;
  }
  void take(MutexState& mutex) {
    mutex.owner = current_;
    event(mutex.history);
    happens_after(&mutex);
  }

  std::uint64_t event_with(std::uint64_t history) {
    current_->history = mix(mix(current_->history, history), static_cast<std::uint64_t>(now_));
    state_ += current_->history;
    return current_->history;
  }
  void event(std::uint64_t& history) { history = event_with(history); }

  [[noreturn]] void loop() {
    for (;;) {
      if (current_->can_run()) change(main_, current_->context, false);   // not if its time is up and its mutex is held
      // Now it is at a point, waits or has ended.
      if (current_->wait == Wait::choice) {
        current_->chosen = static_cast<int>(decide(static_cast<std::size_t>(current_->choices), false, [&](std::size_t i) { return mix(current_->history, 1000 + i); }));
        continue;
      }
      auto const possible = alternatives();
      if (possible.empty()) end();
      std::size_t const chosen = decide(possible.size(), current_->can_run() && current_->fine, [&](std::size_t i) { return mix(possible[i].task->history, possible[i].by_time ? 2 : 1); });
      auto const [task, by_time] = possible[chosen];
      if (by_time) {
        now_ = std::max(now_, task->deadline);
        if (now_ > most_time) fail("a thread never comes to rest");
        task->timed_out = true, task->quiet = chosen == 0, task->deadline = never;
        task->wait = task->wait == Wait::condition ? Wait::lock : Wait::none;
        state_ += mix(task->history, static_cast<std::uint64_t>(now_));
      }
      current_ = task;
    }
  }

  // What can be next, the executor's own choice first.
  std::vector<Alternative> alternatives() const {
    std::vector<Alternative> possible;
    auto const begin = static_cast<std::size_t>(current_->number);
    for (std::size_t i = 0; i < tasks_.size(); ++i)
      if (auto& task = tasks_[(begin + i) % tasks_.size()]; task->can_run()) possible.push_back({task.get(), false});
    Nanoseconds earliest = never;
    for (auto const& task : tasks_)
      if (task->wait == Wait::time || task->wait == Wait::condition) earliest = std::min(earliest, task->deadline);
    if (earliest != never && (possible.empty() || earliest - now_ <= most_early))
      for (auto const& task : tasks_)
        if ((task->wait == Wait::time || task->wait == Wait::condition) && task->deadline == earliest) possible.push_back({task.get(), true});
    return possible;
  }

  template <class Key>
  std::size_t decide(std::size_t count, bool fine, Key key) {
    if (quiet_) return 0;
    auto const point = points_++;
    if (points_ > most_points) fail("a thread never comes to rest");
    if (mode_ == Mode::replay) {
      for (auto const& one : replayed)
        if (one.point == point && one.alternative < count) return remember(point, one.alternative), one.alternative;
      return 0;
    }
    if (mode_ == Mode::random) {
      if (count < 2 || next_random() % 1000 >= likelihood_) return 0;
      auto const chosen = 1 + next_random() % (count - 1);
      remember(point, chosen);
      return static_cast<std::size_t>(chosen);
    }
    std::uint64_t const here = mix(mix(state_ ^ salt_, static_cast<std::uint64_t>(now_)), mix(current_->history, static_cast<std::uint64_t>(current_->wait)));
    for (int left = left_; left <= bounds_.deviations; ++left)
      if (shared_.has(mix(here, static_cast<std::uint64_t>(left)))) ++shared_.cut, leave_process(0);
    shared_.add(mix(here, static_cast<std::uint64_t>(left_)));
    ++shared_.states;
    if (left_ == 0 || (fine && !bounds_.everywhere)) return 0;
    for (std::size_t i = 1; i < count; ++i) {
      if (!shared_.add(mix(mix(here, key(i)), 4000 + static_cast<std::uint64_t>(left_)))) continue;
      auto const before = shared_.deviations;
      pid_t const child = ::fork();
      if (child < 0) fail("no process");
      if (child == 0) {
        --left_;
        remember(point, i);
        return i;
      }
      wait_for(child);
      shared_.deviations = before;
    }
    return 0;
  }
  void remember(std::uint64_t point, std::uint64_t alternative) {
    if (shared_.deviations < 4096) shared_.deviation[shared_.deviations++] = {static_cast<std::uint32_t>(point), static_cast<std::uint32_t>(alternative)};
  }
  void wait_for(pid_t child) {
    if (!ended_well(child, shared_)) leave_process(1);
  }

 public:
  static bool ended_well(pid_t child, Shared& shared) {
    int status = 0;
    while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return true;
    if (shared.failure[0] == 0) {
      std::string const how = WIFSIGNALED(status) ? "signal " + std::to_string(WTERMSIG(status)) : "exit status " + std::to_string(WEXITSTATUS(status));
      std::snprintf(shared.failure, sizeof shared.failure, "the process ended with %s\n  deviations: %s\n", how.c_str(), deviations_in_words(shared).c_str());
    }
    return false;
  }

 private:
  [[noreturn]] void end() {
    for (auto const& task : tasks_)
      if ((task->number == 0 && task->wait != Wait::ended) || task->wait == Wait::lock || task->wait == Wait::join) fail("deadlock: nobody can run");
    ++shared_.schedules;
    if (shared_.deviations == 0) shared_.points = points_;
    if (shared_.add(mix(state_, 99))) ++shared_.distinct;
    leave_process(0);
  }
  std::uint64_t next_random() { return random_ = mix(random_, 5); }

  static constexpr Nanoseconds most_early = 200 * 1000000;   // who could run may stand still so long, and no longer: deadlines of minutes are there for worse
  static constexpr std::uint64_t most_points = 2000000;
  static constexpr Nanoseconds most_time = Nanoseconds{24} * 3600 * 1000000000;

  Shared& shared_;
  Bounds bounds_;
  int left_;
  Mode mode_;
  std::uint64_t random_;
  std::uint64_t salt_;   // what other bounds have tried says nothing of these
  std::uint64_t likelihood_ = 10 + 40 * (next_random() % 8);   // of a deviation, in 1000
  Context main_;
  std::vector<std::unique_ptr<Task>> tasks_;
  Task* current_ = nullptr;
  Nanoseconds now_ = 1000000000;
  std::uint64_t state_ = 0, points_ = 0, count_ = 0;
  bool quiet_ = false;
  std::vector<std::string> notes_;
};

}  // namespace schedules

// What a test says inside a schedule.

/// A point at which others may run. `what` is for the reader of a failure.
inline void step(std::string const& what, std::string const& detail = {}) {
  schedules::Unseen const unseen;
  auto* const scheduler = schedules::Scheduler::here();
  if (scheduler != nullptr) scheduler->step(what + (detail.empty() ? "" : ' ' + detail));
}
/// All others go on until none can; or any number of points earlier, as a deviation.
inline void let_others_run() {
  schedules::Unseen const unseen;
  auto& scheduler = *schedules::Scheduler::here();
  scheduler.sleep(scheduler.now(), "let others run");
}
/// A number below `choices`: 0, the others as deviations.
inline int choose(int choices, char const* what) {
  schedules::Unseen const unseen;
  return schedules::Scheduler::here()->choose(choices, what);
}
/// Ends the search.
[[noreturn]] inline void fail(std::string const& what) {
  schedules::Unseen const unseen;
  schedules::Scheduler::here()->fail(what);
}
inline void require(bool holds, char const* what) {
  if (!holds) fail(what);
}
/// Whether deviations are tried from here on: not of what a test prepares, nor of what it looks at in the end.
inline void explore_from_here(bool explored) {
  schedules::Unseen const unseen;
  schedules::Scheduler::here()->quiet(!explored);
}
/// Nothing is tried any more, and all others go on until they have ended or wait for ever.
inline void come_to_rest() {
  explore_from_here(false);
  schedules::Unseen const unseen;
  auto& scheduler = *schedules::Scheduler::here();
  scheduler.sleep(scheduler.now() + std::int64_t{3600} * 1000000000, "rest");
}

/// Searches all schedules of `body` within the bounds, then `random` more with any number of deviations. `body` is run in processes of its own, many
/// times; it must do the same every time.
///
/// Environment   DCP_SCHEDULE="<name>=<deviations>" runs that schedule only, and prints its steps if it fails
inline Found explore(char const* name, std::vector<Bounds> const& bounds, int random, std::uint64_t seed, std::function<void()> const& body) {
  using namespace schedules;
  // Every process of the search meets every page of it: a small one is fast.
  std::uint64_t const slots = long_run() ? 1 << 22 : 1 << 18;
  std::size_t const bytes = sizeof(Shared) + slots * sizeof(std::uint64_t);
  auto* const shared = static_cast<Shared*>(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  Found found;
  if (shared == MAP_FAILED) return found.failure = "no memory", found;
  shared->slots = slots;
  std::fflush(nullptr);
  auto const run = [&](Bounds const& within, Mode mode, std::uint64_t with, std::vector<Shared::Deviation> const& replayed) {
    shared->deviations = 0;
    pid_t const child = ::fork();
    if (child == 0) {
      Scheduler scheduler{*shared, within, mode, with};
      scheduler.replayed = replayed;
      scheduler.run(body);
    }
    return child > 0 && Scheduler::ended_well(child, *shared);
  };
  bool well = true;
  if (char const* const wanted = std::getenv("DCP_SCHEDULE")) {
    std::string_view text = wanted;
    if (std::string_view const of{name}; text.size() > of.size() && text.starts_with(of) && text[of.size()] == '=') {
      std::vector<Shared::Deviation> replayed;
      unsigned point = 0, alternative = 0;
      int used = 0;
      for (char const* at = wanted + of.size() + 1; std::sscanf(at, "%u:%u%n", &point, &alternative, &used) == 2; at += used + (at[used] == ',' ? 1 : 0)) replayed.push_back({point, alternative});
      well = run({}, Mode::replay, 0, replayed);
    }
  } else {
    for (auto const& within : bounds) {
      if (!well) break;
      well = run(within, Mode::search, 0, {});
    }
    for (int i = 0; i < random && well; ++i) well = run({}, Mode::random, seed + static_cast<std::uint64_t>(i), {});
  }
  found.schedules = shared->schedules, found.cut = shared->cut, found.distinct = shared->distinct, found.states = shared->states, found.points = shared->points;
  if (!well) found.failure = std::string{"schedule \""} + name + "\": " + shared->failure + "  again: DCP_SCHEDULE='" + name + "=" + Scheduler::deviations_in_words(*shared) + "'\n";
  ::munmap(shared, bytes);
  return found;
}

}  // namespace dcp::test
