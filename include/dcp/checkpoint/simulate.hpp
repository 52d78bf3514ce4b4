// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a save would do on any number of ranks, without the ranks: the agreement's messages and the planner that every rank of a real job
// runs, run here for as many of the ranks as one likes. Nothing is written, and tensors need no memory.

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/io/reserved_addresses.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <iomanip>
#include <map>
#include <memory>
#include <ostream>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

/// A rank of a job that is only imagined. Meshes are made from it, and its tensors.
class SimulatedRank {
 public:
  SimulatedRank(std::int64_t rank, std::int64_t size) : rank_{rank}, size_{size} {}

  std::int64_t rank() const { return rank_; }
  std::int64_t size() const { return size_; }

  /// A tensor like those of the real job, on addresses that nothing is behind.
  ///
  /// Example   state.add("w", rank.tensor<float, dcp::Placement<dcp::Shard<0>>>(mesh, {4096, 4096}));
  template <class T, class P, int N, class Shape>
  ShardedTensor<T, P> tensor(DeviceMesh<N> const& mesh, Shape const& shape) {
    return {mesh, shape, memory<T>(static_cast<std::int64_t>(local_box<P>(mesh, shape).size()))};
  }
  /// Of a flat bucket; `memory`: this rank's shard, from memory<T>().
  template <class T>
  std::span<storage_of<T>> memory(std::int64_t elements) {
    std::uint64_t const bytes = ceil_div<std::uint64_t>(static_cast<std::uint64_t>(elements) * static_cast<std::uint64_t>(bits_of(dtype_of<T>)), 8);
    return {reinterpret_cast<storage_of<T>*>(addresses_.take(bytes)), static_cast<std::size_t>(bytes / sizeof(storage_of<T>))};
  }

 private:
  std::int64_t rank_, size_;
  ReservedAddresses<> addresses_;
};

/// A job to simulate.
struct SimulatedJob {
  std::int64_t ranks = 1;
  /// What a rank would pass to save.
  std::function<StateDict(SimulatedRank&)> state = {};
  /// Equal for ranks that list the same names in the same layouts, so that only one of them need be asked; without it, all ranks are.
  std::function<std::int64_t(std::int64_t rank)> kind_of = {};
  /// The ranks to plan for. Empty: all of a job of up to 16, else 16 over its whole length.
  std::vector<std::int64_t> planned = {};
  std::uint64_t block_bytes = 4096;    // of the file system
};

/// What planning cost a rank, and what the rank would do. Bytes are of tensors and headers.
struct SimulatedPlan {
  std::int64_t rank = 0;
  double agree_seconds = 0;            // describing its state, and merging what the kinds of rank describe
  double plan_seconds = 0;             // from there to knowing all of its writes
  double exchange_seconds = 0;         // finding what goes to whom, over the whole save
  std::uint64_t plan_bytes = 0;        // memory of the plan
  std::uint64_t held_bytes = 0;        // that it is the source of
  std::uint64_t sent_bytes = 0;        // of them, to other ranks
  std::uint64_t received_bytes = 0;
  std::uint64_t written_bytes = 0;
  std::uint64_t files = 0;             // that it opens
};
struct SimulatedFile {
  std::string path;
  std::uint64_t bytes = 0;
  std::int64_t writers = 0;            // ranks that open it
};
struct Simulation {
  std::int64_t ranks = 0, kinds = 0;
  std::uint64_t tensors = 0, values = 0, tensor_bytes = 0;
  std::uint64_t schema_bytes = 0;      // that the opening agreement broadcasts: one schema a kind, nothing where there is one kind
  std::int64_t broadcasts = 0;         // of them
  std::uint64_t record_bytes = 0;      // dcp.json, without the values
  std::uint64_t checksums_bytes = 0;   // dcp.crc
  std::uint64_t index_bytes = 0;       // indexes, all together
  std::vector<SimulatedFile> files;    // data files; of a layout with files of their own for ranks, those of the planned ranks
  std::vector<std::uint64_t> written;  // bytes that each rank writes
  std::uint64_t least_rounds = 0;      // of the exchange: more where ranks have more to send than to receive
  std::vector<SimulatedPlan> plans;

  /// The most that a rank writes, in means of all ranks.
  template <class = Deferred>
  double imbalance() const {
    std::uint64_t most = 0, sum = 0;
    for (auto const bytes : written) most = std::max(most, bytes), sum += bytes;
    return sum == 0 ? 1 : static_cast<double>(most) * static_cast<double>(written.size()) / static_cast<double>(sum);
  }

  template <class = Deferred>
  friend std::ostream& operator<<(std::ostream& out, Simulation const& s) {
    auto const count = [](std::uint64_t n, char const* what) { return std::to_string(n) + ' ' + what + (n == 1 ? "" : "s"); };
    out << "job        " << count(static_cast<std::uint64_t>(s.ranks), "rank") << " of " << count(static_cast<std::uint64_t>(s.kinds), "kind") << "; " << count(s.tensors, "tensor") << ", "
        << human_bytes(s.tensor_bytes) << "; " << count(s.values, "value");
    out << "\nagreement  " << s.broadcasts << " schemas broadcast, " << human_bytes(s.schema_bytes) << ", beside a gather of digests; planning needs no more communication";
    std::uint64_t largest = 0;
    std::int64_t most_writers = 0;
    for (auto const& file : s.files) largest = std::max(largest, file.bytes), most_writers = std::max(most_writers, file.writers);
    out << "\nrecords    dcp.json " << human_bytes(s.record_bytes) << ", dcp.crc " << human_bytes(s.checksums_bytes) << ", indexes " << human_bytes(s.index_bytes);
    out << "\nfiles      " << s.files.size() << ", the largest " << human_bytes(largest) << ", opened by at most " << count(static_cast<std::uint64_t>(most_writers), "rank");
    std::uint64_t most = 0, sum = 0;
    for (auto const bytes : s.written) most = std::max(most, bytes), sum += bytes;
    out << "\nwritten    by a rank at most " << human_bytes(most) << ", on average " << human_bytes(s.written.empty() ? 0 : sum / s.written.size()) << "; at least " << count(s.least_rounds, "round") << " of exchange";
    out << "\n\n     rank  agree ms   plan ms  exchange ms       plan       held       sent   received    written  files";
    for (auto const& plan : s.plans) {
      auto const flags = out.flags();
      out << '\n' << std::setw(9) << plan.rank << std::fixed << std::setprecision(2) << std::setw(10) << 1e3 * plan.agree_seconds << std::setw(10) << 1e3 * plan.plan_seconds << std::setw(13) << 1e3 * plan.exchange_seconds;
      for (auto const bytes : {plan.plan_bytes, plan.held_bytes, plan.sent_bytes, plan.received_bytes, plan.written_bytes}) out << std::setw(11) << human_bytes(bytes);
      out << std::setw(7) << plan.files;
      out.flags(flags);
    }
    return out << '\n';
  }
};

namespace detail {

template <class = Deferred>
Simulation simulate(AnyStorage const& storage, SimulatedJob const& job, SaveSettings const& settings) {
  using clock = SteadyClock;
  auto const seconds_since = [](clock::time_point begin) { return std::chrono::duration<double>(clock::now() - begin).count(); };
  if (job.ranks < 1 || !job.state) throw Error{ErrorCode::invalid_argument, "a simulated job needs ranks, and the state of each"};
  check_resources(settings.memory_bytes, settings.threads);
  if (settings.writers_per_file < 1) throw Error{ErrorCode::invalid_argument, "writers_per_file is " + std::to_string(settings.writers_per_file)};
  Simulation result;
  result.ranks = job.ranks;

  // Distinct kinds of rank, each by its lowest rank.
  std::vector<std::int64_t> first_rank;
  std::vector<Tie> ties;
  std::vector<Bytes> schemas;
  {
    std::set<std::int64_t> kinds;
    std::set<std::uint64_t> digests;
    for (std::int64_t r = 0; r < job.ranks; ++r) {
      if (job.kind_of && !kinds.insert(job.kind_of(r)).second) continue;
      SimulatedRank rank{r, job.ranks};
      StateDict const state = job.state(rank);
      Schema const schema = local_schema(state, true);
      if (!digests.insert(schema_digest(schema)).second) continue;
      append(ties, schema.ties);
      append(ties, find_ties(state, r));
      first_rank.push_back(r);
      schemas.push_back(encode(schema));
    }
    detail::sort(ties);
    ties.erase(std::unique(ties.begin(), ties.end()), ties.end());
  }
  result.kinds = static_cast<std::int64_t>(first_rank.size());
  if (result.kinds > 1) {
    result.broadcasts = result.kinds;
    for (auto const& schema : schemas) result.schema_bytes += schema.size();
  }

  std::vector<std::int64_t> planned = job.planned;
  if (planned.empty())
    for (std::int64_t i = 0, n = std::min<std::int64_t>(job.ranks, 16); i < n; ++i) planned.push_back(n == 1 ? 0 : i * (job.ranks - 1) / (n - 1));
  bool const all = std::set<std::int64_t>(planned.begin(), planned.end()).size() == static_cast<std::size_t>(job.ranks);
  result.written.assign(static_cast<std::size_t>(job.ranks), 0);
  std::map<std::string, std::set<std::int64_t>> writers;
  for (auto const r : planned) {
    SimulatedRank rank{r, job.ranks};
    StateDict const state = job.state(rank);
    SimulatedPlan plan;
    plan.rank = r;

    auto begin = clock::now();
    auto const sorted = sorted_entries(state);
    Schema mine = local_schema(state, true, sorted);
    static_cast<void>(find_ties(state, r));
    static_cast<void>(schema_digest(mine));
    std::vector<Schema> parts;
    if (schemas.size() == 1) parts.push_back(std::move(mine));
    else
      for (auto const& schema : schemas) parts.push_back(decode_schema(schema));
    AgreedState const agreed = merge_states(std::move(parts), first_rank, ties, state, sorted, job.ranks);
    check_own_part(agreed, r, true);
    plan.agree_seconds = seconds_since(begin);

    begin = clock::now();
    PlannedState const planned_state = PlannedState::of(agreed, storage, r, job.ranks);
    SavePlan const writes = planned_state.writes(agreed, r, job.ranks, {job.block_bytes, settings.writers_per_file});
    plan.plan_seconds = seconds_since(begin);
    plan.plan_bytes = planned_state.shares.memory_bytes() + planned_state.files.memory_bytes() + writes.memory_bytes();

    for (auto const& transfer : writes.transfers()) plan.held_bytes += transfer.bytes();
    begin = clock::now();
    std::set<std::uint32_t> opened;
    SharedWindows const windows{writes.files(), writes.slots(), Budget::of(settings.memory_bytes, settings.threads).round_bytes};
    for (std::uint64_t w = 0; w < windows.size(); ++w) {
      auto const at = windows[w];
      if (at.range.begin == at.range.end) continue;
      SavePlan::Window const window = writes.window(at.file, at.range.begin, at.range.end);
      for (auto const& part : window.outgoing) plan.sent_bytes += part.range.size();
      std::uint64_t owned = 0;
      for (auto const& range : window.direct) owned += range.size();
      for (auto const& range : window.gathered) owned += range.size();
      if (owned > 0) opened.insert(at.file);
      plan.written_bytes += owned;
    }
    for (std::uint32_t f = 0; f < writes.files().size(); ++f)
      if (writes.files()[f].only_rank == r) opened.insert(f), plan.written_bytes += writes.files()[f].size;
    plan.exchange_seconds = seconds_since(begin);
    plan.received_bytes = plan.written_bytes + plan.sent_bytes - plan.held_bytes;
    plan.files = opened.size();
    for (auto const f : opened) writers[writes.files()[f].path].insert(r);

    if (result.plans.empty()) {
      result.tensors = agreed.tensors.size();
      result.values = agreed.values.size();
      for (auto const& tensor : agreed.tensors) result.tensor_bytes += bytes_of(tensor.dtype, tensor.layout.shape.elements());
      result.least_rounds = windows.size() / static_cast<std::uint64_t>(std::max<std::int64_t>(1, writes.slots().owners()));
      for (auto const& slot : writes.slots().all()) {
        result.written[static_cast<std::size_t>(slot.owner)] += slot.end - slot.begin;
        writers[writes.files()[slot.file].path].insert(slot.owner);
      }
      if (writes.slots().empty() && !all)
        for (std::size_t other = 0; other < result.written.size(); ++other) result.written[other] = static_cast<std::uint64_t>(planned_state.shares.loads()[other]);
      // The texts of the commit are rank 0's.
      FilePlan const committed = storage.plan_files({planned_state.stored(agreed), planned_state.shares, agreed.ties, 0, job.ranks, nullptr, nullptr, planned_state.recoding ? &planned_state.recoding->parts_of() : nullptr});
      for (auto const& [path, bytes] : committed.commit_files) result.index_bytes += bytes.size();
      CommitRecord record = record_of(storage, agreed, planned_state.stored(agreed));
      record.id = std::string(16, '0');
      for (auto const& file : writes.files()) record.files.push_back({file.path, file.size, 0, 0, true, settings.checksums});
      for (auto const& [path, bytes] : committed.commit_files) record.files.push_back({path, bytes.size(), 0, 0, false, true});
      for (auto const& file : record.files) result.checksums_bytes += 8 * file.chunks();
      Bytes large;
      result.record_bytes = write_record(record, large).size();
    }
    if (all) result.written[static_cast<std::size_t>(r)] = plan.written_bytes;
    for (auto const& file : writes.files())
      if (result.plans.empty() || file.only_rank >= 0) result.files.push_back({file.path, file.size, 0});
    result.plans.push_back(plan);
  }
  for (auto& file : result.files) file.writers = static_cast<std::int64_t>(writers[file.path].size());
  return result;
}

}  // namespace detail

/// What save<S> would do in a job of any size. Not collective: needs no other rank, no file and no memory for tensors.
///
/// Cost      the planning of each of job.planned; states of all ranks, unless job.kind_of says which are alike
/// Throws    what the agreement and the planning of the save would throw
/// Example   std::cout << dcp::simulate_save<dcp::SafeTensors>({.ranks = 8960, .state = state_of, .kind_of = [](std::int64_t) { return 0; }});
template <class S>
Simulation simulate_save(SimulatedJob const& job, SaveOptions<S> const& options = {}) {
  [[maybe_unused]] detail::a_storage<S> check;
  if constexpr (Storage<S>) return detail::simulate(*S::open(options.storage), job, detail::settings_of(options));
  else return {};
}

}  // namespace dcp
