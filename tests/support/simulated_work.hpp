// SPDX-License-Identifier: Apache-2.0
#pragma once
// The streams of devices that are not there: work that is done late, and only when somebody waits for it.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

namespace dcp::test {

/// Not thread-safe. A status of 0 is success.
class SimulatedWork {
 public:
  static constexpr int not_ready = 600;

  struct Queue;
  struct Op {
    Queue const* queue;
    std::function<int()> work;
    int delay;   // how often it is asked for in vain
    bool held;
    std::vector<std::shared_ptr<Op>> after = {};   // all of these are earlier in pending_, or done
    int status = 0;
    bool done = false, needed = false;
  };
  struct Queue {
    int ordinal;
    bool library, blocking;
    bool destroyed = false;   // its work goes on
    std::shared_ptr<Op> last = nullptr;
  };

  SimulatedWork(int devices, int lost_status) : lost_status_{lost_status} {
    for (int ordinal = 0; ordinal < devices; ++ordinal) add(static_cast<std::uint64_t>(ordinal) + 1, ordinal, false, false);
  }
  SimulatedWork(SimulatedWork const&) = delete;
  SimulatedWork& operator=(SimulatedWork const&) = delete;
  ~SimulatedWork() {
    for (auto const& op : pending_) op->after.clear();   // else a long stream is destroyed recursively
  }

  void add(std::uint64_t id, int ordinal, bool library, bool blocking) { queues_[id] = std::make_unique<Queue>(Queue{ordinal, library, blocking}); }
  Queue* find(std::uint64_t id) {
    auto const queue = queues_.find(id);
    return queue == queues_.end() || queue->second->destroyed ? nullptr : queue->second.get();
  }
  static std::uint64_t legacy(int ordinal) { return static_cast<std::uint64_t>(ordinal) + 1; }
  int library_queues() const {
    int count = 0;
    for (auto const& [id, queue] : queues_) count += queue->library && !queue->destroyed ? 1 : 0;
    return count;
  }

  std::shared_ptr<Op> put(Queue& queue, std::function<int()> work, std::shared_ptr<Op> const& event = nullptr, int delay = 0, bool held = false) {
    auto op = std::make_shared<Op>(Op{&queue, std::move(work), delay, held});
    auto const comes_after = [&](std::shared_ptr<Op> const& other) {
      if (other) op->after.push_back(other);
    };
    comes_after(queue.last);
    comes_after(event);
    Queue const* const old = find(legacy(queue.ordinal));
    if (queue.blocking) comes_after(old->last);
    for (auto const& [id, other] : queues_)
      if (&queue == old && other->blocking && other->ordinal == queue.ordinal) comes_after(other->last);
    pending_.push_back(op);
    return queue.last = std::move(op);
  }
  void release(Queue const& queue) {
    for (auto const& op : pending_)
      if (op->queue == &queue) op->held = false;
  }

  /// Does what `last` depends on, and nothing else. not_ready if something of it is held, or delayed and not `now`.
  int advance(std::shared_ptr<Op> const last, bool now = false) {
    if (!last) return 0;
    std::vector<std::shared_ptr<Op>> todo;   // the last first
    last->needed = !last->done;
    for (auto op = pending_.rbegin(); op != pending_.rend(); ++op) {
      if (!std::exchange((*op)->needed, false)) continue;
      for (auto const& before : (*op)->after) before->needed = !before->done;
      todo.push_back(*op);
    }
    for (auto const& op : todo)
      if (op->held) return not_ready;
    for (auto const& op : todo)
      if (op->delay > 0 && !now) return --op->delay, not_ready;
    for (auto op = todo.rbegin(); op != todo.rend(); ++op) perform(**op);
    std::erase_if(pending_, [](auto const& op) { return op->done; });
    return last->status;
  }
  void advance_one_of_all(std::uint64_t random) {
    if (!pending_.empty()) advance(pending_[static_cast<std::size_t>(random % pending_.size())]);
  }
  void drain() {
    for (auto const& op : std::vector{pending_}) {   // each comes behind all that it waits for
      bool const ready = !op->held && std::all_of(op->after.begin(), op->after.end(), [](auto const& before) { return before->done; });
      if (ready) perform(*op);
    }
    std::erase_if(pending_, [](auto const& op) { return op->done; });
  }
  std::size_t pending() const { return pending_.size(); }

  void lose(int ordinal) { lost_.insert(ordinal); }
  bool lost(int ordinal) const { return lost_.contains(ordinal); }

 private:
  void perform(Op& op) {
    if (std::exchange(op.done, true)) return;   // by a kernel that waited itself
    for (auto const& before : op.after)
      if (op.status == 0) op.status = before->status;
    if (op.status == 0 && lost(op.queue->ordinal)) op.status = lost_status_;
    if (op.status == 0) op.status = op.work();
    op.after.clear();
    op.work = nullptr;
  }

  int const lost_status_;
  std::map<std::uint64_t, std::unique_ptr<Queue>> queues_;
  std::vector<std::shared_ptr<Op>> pending_;   // in the order of the calls
  std::set<int> lost_;
};

}  // namespace dcp::test
