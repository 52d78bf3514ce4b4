// SPDX-License-Identifier: Apache-2.0
#pragma once
// save: a state of all ranks becomes one checkpoint, or nothing changes.
//
//   1. agree       ranks mean the same state and options; rank 0 alone looks at the place and tells the others
//   2. attempt     rank 0 makes a directory beside the place (below it, where directories are not renamed), with a record that says "open"; every rank finds it, or the place is
//                  not shared by all ranks
//   3. plan        which rank writes which bytes: computed by every rank for itself
//   4. write       fragments and short runs to the owners of their blocks, everything else straight to its final position, with
//                  checksums of what was staged, then a sync of every file by every rank that wrote to it
//   5. commit      on rank 0: every byte written exactly once, every size as planned; index, checksums, and last the record
//   6. publish     the attempt takes the place, or the place's record names it; all ranks learn the outcome; only then the old checkpoint is removed

#include <dcp/base/algorithms.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/crc32.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/agreement.hpp>
#include <dcp/checkpoint/arranged_source.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/place.hpp>
#include <dcp/checkpoint/recode.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/checkpoint/write.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/plan/save_plan.hpp>
#include <dcp/storage/storage.hpp>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dcp {
namespace detail {

/// Whether every rank finds what rank 0 has just made. Collective.
template <class = Deferred>
void require_shared(CommRef comm, AnyMedium& medium, std::string const& attempt, std::string const& id, std::chrono::milliseconds visible_within) {
  agree(comm, "save: attempt", [&] {
    auto const until = SteadyClock::now() + visible_within;
    auto pause = std::chrono::milliseconds{1};
    for (;; pause = std::min(2 * pause, std::chrono::milliseconds{500})) {
      std::optional<CommitRecord> record;
      std::optional<Error> failure;
      try {
        record = read_record(medium, attempt);
      } catch (Error const& error) {
        failure = error;
      }
      if (record && record->id == id) return;
      comm.progress();
      if (SteadyClock::now() + pause > until) {
        Error error{ErrorCode::not_shared, "this directory is not shared by ranks 0 and " + std::to_string(comm.rank()) + ": rank 0 has made it, and rank " + std::to_string(comm.rank()) + " does not see it"};
        error.with_path(attempt);
        if (failure) error.with_errno(failure->system_error()).with_hint("what it found when it looked: " + failure->message());
        error.with_hint("every rank must see the same file system at this path; a node-local disk is none");
        throw error;
      }
      this_thread::sleep_for(pause);
    }
  });
}

/// Replicated tensors with different contents on their replicas. Reads everything; collective.
template <class = Deferred>
void compare_replicas(CommRef comm, AgreedState const& state) {
  std::vector<std::uint64_t> mine(state.tensors.size(), 0);
  agree(comm, "save: check", [&] {
    for (std::size_t t = 0; t < state.tensors.size(); ++t) {
      auto const& tensor = state.tensors[t];
      auto const held = held_by(tensor.layout, comm.rank());
      if (!held || replicas(tensor.layout) == 1 || state.local_tensors[t] == nullptr || state.local_tensors[t]->tensor->source) continue;
      std::uint64_t raw = 0;
      for_each_held_box(*held, tensor.dtype, state.local_tensors[t]->tensor->memory, [&](Box const& box, MemoryView const& memory) {
        Transfer const transfer = make_transfer(tensor.dtype, tensor.dtype, box, box, memory, box, 0);
        if (auto const device = state.devices.of(t)) {
          constexpr std::int64_t piece = 1 << 20;
          Bytes bytes;
          for (std::int64_t at = 0; at < transfer.end; at += piece) {
            pack(device, transfer, at, std::min(transfer.end, at + piece), bytes);
            raw = crc64_raw(bytes, raw);
          }
          return;
        }
        transfer.for_each_run(0, transfer.end, [&](std::uint64_t, std::byte const* run, std::size_t bytes) { raw = crc64_raw({run, bytes}, raw); });
      });
      mine[t] = raw ^ 1;
    }
  });
  std::vector<std::uint64_t> all(mine.size() * static_cast<std::size_t>(comm.size()));
  if (!mine.empty()) comm.all_gather(std::as_bytes(std::span{mine}), std::as_writable_bytes(std::span{all}));
  Problems problems;
  for (std::size_t t = 0; t < state.tensors.size(); ++t) {
    Layout const& layout = state.tensors[t].layout;
    if (replicas(layout) == 1) continue;
    for (std::int64_t cell = 0; cell < cells(layout); ++cell) {
      auto const coordinate = cell_coordinate(layout, cell);
      auto const first = layout.mesh.rank_at(coordinate);
      for (std::int64_t r = 1; r < replicas(layout); ++r) {
        auto const other = layout.mesh.rank_at(replica_coordinate(layout, coordinate, r));
        if (all[static_cast<std::size_t>(first) * mine.size() + t] == all[static_cast<std::size_t>(other) * mine.size() + t]) continue;
        problems.add(ErrorCode::ranks_disagree, state.tensors[t].name + ": rank " + std::to_string(first) + " and rank " + std::to_string(other) + " hold different contents of a replicated tensor");
        break;
      }
    }
  }
  try {
    problems.raise();
  } catch (Error& error) {
    throw error.with_phase("save: check");
  }
}

/// A box of a tensor that has a source. Of elements smaller than a byte it is a box of bytes, and reads as many slices as begin and end on one.
template <class = Deferred>
class BoxSource final : public ElementSource {
 public:
  BoxSource(std::shared_ptr<TensorSource const> source, DType dtype, Box const& box) : source_{std::move(source)}, dtype_{dtype}, box_{box} {}
  void produce(std::int64_t first, std::int64_t count, std::byte* out) const override {
    std::int64_t const bits = bits_of(dtype_);
    if (bits >= 8) {
      for_each_box(box_, first, first + count, [&](Box const& box, std::int64_t at) { source_->read(box, out + (at - first) * bits / 8); });
      return;
    }
    if (box_.rank() == 0) return source_->read(box_, out);
    std::int64_t const slice = std::max<std::int64_t>(1, box_.shape.elements() / box_.shape[0]) * bits;   // in bits
    std::int64_t whole = 1;                                                                              // slices that are whole bytes
    while (slice * whole % 8 != 0) whole *= 2;
    std::int64_t const begin = first * 8 / slice / whole * whole, end = std::min(box_.shape[0], ceil_div(ceil_div((first + count) * 8, slice), whole) * whole);
    Box box = box_;
    box.origin[0] += begin;
    box.shape[0] = end - begin;
    Bytes bytes(static_cast<std::size_t>(bytes_of(dtype_, static_cast<std::int64_t>(box.size()))));
    source_->read(box, bytes.data());
    std::memcpy(out, bytes.data() + (first - begin * slice / 8), static_cast<std::size_t>(count));
  }

 private:
  std::shared_ptr<TensorSource const> source_;
  DType dtype_;
  Box box_;
};

/// The bytes of a CrcLiteral, with the CRC-32 of what memory holds when they are asked for. That is once a save, or twice where a window ends among them.
template <class = Deferred>
class CrcSource final : public ElementSource {
 public:
  CrcSource(CrcLiteral const& literal, std::vector<Transfer> data) : literal_{literal}, data_{std::move(data)} {}
  void produce(std::int64_t first, std::int64_t count, std::byte* out) const override {
    std::uint32_t crc = 0;
    for (auto const& transfer : data_) {
      if (transfer.source == nullptr) {
        transfer.for_each_run(transfer.begin, transfer.end, [&](std::uint64_t, std::byte const* memory, std::size_t bytes) { crc = crc32({memory, bytes}, crc); });
        continue;
      }
      std::int64_t const each = std::max<std::int64_t>(1, (256 << 10) * 8 / bits_of(transfer.dtype));
      Bytes made;
      for (std::int64_t at = transfer.begin; at < transfer.end; at += each) {
        std::int64_t const size = std::min(each, transfer.end - at);
        made.resize(static_cast<std::size_t>(bytes_of(transfer.dtype, size)));
        transfer.source->produce(at, size, made.data());
        crc = crc32(made, crc);
      }
    }
    Bytes bytes = literal_.bytes;
    for (auto const at : literal_.at) std::memcpy(bytes.data() + at, &crc, sizeof crc);
    std::memcpy(out, bytes.data() + first, static_cast<std::size_t>(count));
  }
  bool copied() const override {
    return std::all_of(data_.begin(), data_.end(), [](Transfer const& transfer) { return transfer.source != nullptr && transfer.source->copied(); });
  }

 private:
  CrcLiteral const& literal_;   // of the file plan
  std::vector<Transfer> data_;  // of the stored box, in the order of the file
};

/// This rank's part of what is stored. `recoding`: nullptr where all is stored as it is. `sources`: what the transfers refer to.
template <class = Deferred>
std::vector<Transfer> transfers_to_save(AgreedState const& state, Shares const& shares, FilePlan const& plan, Recoding const* recoding, std::int64_t rank, std::int64_t ranks, std::vector<std::unique_ptr<ElementSource>>& sources) {
  std::vector<Transfer> transfers;
  std::size_t headers = 0;
  for (auto const& file : plan.files) headers += file.literals.size();
  transfers.reserve(plan.stored.size() + headers + plan.crc_literals.size());
  std::size_t next_crc = 0;
  // Most tensors of a model have one of a few layouts.
  struct Here {
    bool known = false;
    std::optional<MeshGeometry::Coordinate> coordinate;
    HeldPart held;
  };
  std::vector<Here> groups(shares.groups());
  std::uint32_t next_file = 0;
  auto const literals_before = [&](std::uint64_t file) {
    for (; next_file < file; ++next_file) append_literals(plan, next_file, rank, ranks, transfers);
  };
  Arrangement const* const arrangement = state.arrangement.get();
  for (auto const& stored : plan.stored) {
    literals_before(stored.file + std::uint64_t{1});
    if (stored.box.shape.empty()) continue;
    StoredForm const* const form = recoding == nullptr ? nullptr : &recoding->forms()[stored.tensor];
    bool const recoded = form != nullptr && form->recoded;
    std::uint32_t const of = form == nullptr ? stored.tensor : form->tensor;
    bool const only_mine = plan.files[stored.file].only_rank >= 0;
    bool const cut = arrangement != nullptr && arrangement->cut(of);
    std::shared_ptr<TensorSource const> const arranged = cut && !recoded ? ArrangedSource<>::of(state, arrangement->from[of]) : nullptr;
    std::size_t const before = transfers.size();
    // What this rank writes of tensor `t` of the state, of which the stored one has `placed`; nullptr: all, as it is.
    auto const add_tensor = [&](std::uint32_t t, PlacedBox const* placed) {
      TensorSpec const& tensor = state.tensors[t];
      StateEntry const* entry = state.local_tensors[t];
      if (entry == nullptr) return;
      Here& here = groups[shares.group_of(t)];
      if (!here.known) {
        here.known = true;
        here.coordinate = tensor.layout.mesh.coordinate_of(rank);
        if (here.coordinate) here.held = held_at(tensor.layout, *here.coordinate);
      }
      if (!here.coordinate || here.held.empty()) return;
      HeldPart const& held = here.held;
      CellRange const range = recoded || !only_mine ? shares.range_of(t, *here.coordinate, held) : CellRange{0, held.elements()};
      if (recoded) {
        // What begins in the elements that this rank would write if they were stored as they are.
        auto const add_part = [&](Box const& box) {
          Box const owned = form->grid.owned(box, cut ? arrangement->from[of].shape : tensor.layout.shape, form->shape);
          Box part;
          if ((form->shape.rank() > 0 || PartGrid::owns_scalar(box)) && intersect(owned, stored.box, part) && !part.empty()) transfers.push_back(recoding->transfer(stored, part));
        };
        std::int64_t const first = held.flat ? held.begin : 0;
        for_each_box(held.box, first + range.begin, first + range.end, [&](Box const& box, std::int64_t) {
          if (placed == nullptr) add_part(box);
          else place_box(*placed, box, box, {}, [&](Box const& at, Box const&, MemoryView const&) { add_part(at); });
        });
        return;
      }
      auto const add_placed = [&](Box const& box, Box const& held_box, MemoryView const& memory, std::shared_ptr<TensorSource const> const& source) -> Transfer* {
        Box part;
        if (!intersect(box, stored.box, part)) return nullptr;
        transfers.push_back(make_transfer(tensor.dtype, tensor.dtype, part, held_box, memory, stored.box, stored.offset));
        transfers.back().tensor = t;
        transfers.back().file = stored.file;
        if (source) {
          sources.push_back(std::make_unique<BoxSource<>>(source, tensor.dtype, part));
          transfers.back().source = sources.back().get();
        } else if (auto device = state.devices.of(t)) {
          sources.push_back(std::make_unique<DeviceSource<>>(std::move(device), transfers.back()));
          transfers.back().source = sources.back().get();
        }
        return &transfers.back();
      };
      auto const add = [&](Box const& box, MemoryView const& memory) { return add_placed(box, box, memory, entry->tensor->source); };
      MemoryView const& memory = entry->tensor->memory;
      if (placed != nullptr) {
        auto const place = [&](Box const& box, Box const& held_box, MemoryView const& at) {
          place_box(*placed, box, held_box, at, [&](Box const& there, Box const& held_there, MemoryView const& memory_there) { add_placed(there, held_there, memory_there, arranged); });
        };
        if (held.flat) {
          auto const [part, begin] = slice_of(held, tensor.dtype, memory, range.begin, range.end);
          for_each_held_box(part, tensor.dtype, begin, [&](Box const& box, MemoryView const& at) { place(box, box, at); });
        } else {
          for_each_box(held.box, range.begin, range.end, [&](Box const& box, std::int64_t) { place(box, held.box, memory); });
        }
      } else if (only_mine) {
        for_each_held_box(held, tensor.dtype, memory, add);
      } else if (held.flat) {
        auto const [part, begin] = slice_of(held, tensor.dtype, memory, range.begin, range.end);
        for_each_held_box(part, tensor.dtype, begin, add);
      } else if (Transfer* const transfer = add(held.box, memory)) {
        // A transfer of elements smaller than a byte counts bytes.
        std::int64_t const bits = std::min(8, bits_of(tensor.dtype));
        transfer->begin = range.begin * bits / 8;
        transfer->end = range.end * bits / 8;
      }
    };
    if (cut)
      for (auto const& placed : arrangement->from[of].from) add_tensor(placed.tensor, &placed);
    else
      add_tensor(arrangement == nullptr ? of : arrangement->from[of].from[0].tensor, nullptr);
    if (!only_mine || recoded || transfers.size() == before) continue;
    auto const number = static_cast<std::size_t>(&stored - plan.stored.data());
    if (next_crc == plan.crc_literals.size() || plan.crc_literals[next_crc].stored != number) continue;
    CrcLiteral const& literal = plan.crc_literals[next_crc++];
    sources.push_back(std::make_unique<CrcSource<>>(literal, std::vector<Transfer>(transfers.begin() + static_cast<std::ptrdiff_t>(before), transfers.end())));
    append_bytes(stored.file, literal.offset, literal.bytes, transfers).source = sources.back().get();
  }
  literals_before(plan.files.size());
  return transfers;
}

/// What ranks compare of the values that all of them must hold alike, as they are now.
template <class = Deferred>
std::uint64_t shared_values_digest(AgreedState const& state) {
  ByteWriter out;
  for (std::size_t v = 0; v < state.values.size(); ++v)
    if (!state.values[v].per_rank && state.local_values[v] != nullptr) out.number(value_crc(value_now(*state.local_values[v])));
  return crc64(out.bytes());
}

/// The values that this rank stores for all: its own where they are per rank, and those that no lower rank has. They are read here.
template <class = Deferred>
Bytes own_values(AgreedState const& state, int rank) {
  ByteWriter out;
  for (std::size_t v = 0; v < state.values.size(); ++v) {
    SchemaEntry const& entry = state.values[v];
    if (state.local_values[v] == nullptr || (!entry.per_rank && entry.first_rank != rank)) continue;
    Value const value = value_now(*state.local_values[v]);
    put(out.number<std::uint64_t>(v).number(rank), value);
  }
  return out.take();
}
/// own_values of all ranks. Complete on rank 0. Collective.
template <class = Deferred>
std::vector<std::pair<std::string, Value>> collect_values(CommRef comm, AgreedState const& state, Bytes const& mine) {
  if (state.values.empty()) return {};   // on all ranks
  Bytes const all = reduce_to_root(
      comm, mine,
      [](Bytes a, Bytes b) {
        append(a, b);
        return a;
      },
      "save: values");
  std::vector<std::pair<std::string, Value>> values;
  if (comm.rank() != 0) return values;
  for (auto const& entry : state.values) values.emplace_back(entry.name, Value{entry.per_rank ? ValueKind::per_rank : entry.value_kind, entry.dtype, {}, {}});
  for (ByteReader in{all}; !in.done() && in.ok();) {
    auto const v = in.number<std::uint64_t>();
    auto const rank = static_cast<std::size_t>(in.number<int>());
    Value value = take_value(in);
    Value& target = values[static_cast<std::size_t>(v)].second;
    if (!state.values[static_cast<std::size_t>(v)].per_rank) {
      target = std::move(value);
      continue;
    }
    target.ranks.resize(static_cast<std::size_t>(comm.size()));
    target.ranks[rank] = std::move(value);
  }
  return values;
}

/// What rank 0 has collected, to all ranks. Collective.
template <class = Deferred>
void broadcast_values(CommRef comm, std::vector<std::pair<std::string, Value>>& values) {
  Bytes bytes;
  if (comm.rank() == 0) {
    ByteWriter out;
    for (auto const& [name, value] : values) put(out.text(name), value);
    bytes = out.take();
  }
  broadcast_bytes(comm, bytes, 0);
  if (comm.rank() == 0) return;
  values.clear();
  for (ByteReader in{bytes}; !in.done() && in.ok();) {
    std::string name = in.text();
    values.emplace_back(std::move(name), take_value(in));
  }
}

/// The commit record, but for values and files.
template <class = Deferred>
CommitRecord record_of(AnyStorage const& storage, AgreedState const& state, std::vector<TensorSpec> const& stored) {
  CommitRecord record;
  record.storage = storage.name();
  record.file_layout = storage.file_layout();
  record.groups = storage.groups();
  record.tensors.reserve(stored.size());
  for (auto const& tensor : stored) record.tensors.push_back({tensor.name, tensor.dtype, tensor.layout.shape});
  for (auto const& tie : state.ties) record.ties.emplace_back(tie.dropped, tie.kept);
  return record;
}

/// Which bytes of which files a state becomes, and which rank writes them. Every rank computes it for itself: no communication, no I/O,
/// and what ranks must know alike depends on nothing but what they agreed on.
struct PlannedState {
  Shares shares;
  FilePlan files;
  std::shared_ptr<Recoding> recoding;   // where tensors are not stored as they are

  template <class = Deferred>
  static PlannedState of(AgreedState const& state, AnyStorage const& storage, std::int64_t rank, std::int64_t ranks, std::vector<std::pair<std::string, Value>> const* values = nullptr) {
    Shares shares{state.tensors, ranks};
    std::shared_ptr<Recoding> recoding = storage.recoding(arranged(state));
    std::vector<NameJoints> joints;   // of the values, which are those of the state in its order
    if (values != nullptr)
      for (auto const& value : state.values) joints.push_back(value.joints);
    FilePlan files = storage.plan_files({recoding ? recoding->stored() : arranged(state), shares, state.ties, rank, ranks, values, &joints, recoding ? &recoding->parts_of() : nullptr,
                                         &state.tensors, recoding ? nullptr : state.arrangement.get()});
    return {std::move(shares), std::move(files), std::move(recoding)};
  }
  /// What the checkpoint has of the state's tensors, but for how it encodes them.
  static std::vector<TensorSpec> const& arranged(AgreedState const& state) { return state.arrangement ? state.arrangement->tensors : state.tensors; }
  /// What the files hold.
  std::vector<TensorSpec> const& stored(AgreedState const& state) const { return recoding ? recoding->stored() : arranged(state); }
  /// The writes of `rank`. Keeps references to `state` and to this.
  template <class = Deferred>
  SavePlan writes(AgreedState const& state, std::int64_t rank, std::int64_t ranks, SavePlan::Options const& options) const {
    std::vector<std::unique_ptr<ElementSource>> sources;
    std::vector<Transfer> transfers = transfers_to_save(state, shares, files, recoding.get(), rank, ranks, sources);
    return {state.tensors, shares, files, std::move(transfers), rank, ranks, options, recoding ? &recoding->forms() : nullptr, state.arrangement.get(), std::move(sources)};
  }
};

/// Rank 0's part of the end: every byte accounted for, then index files, checksums, record.
template <class = Deferred>
void commit_attempt(AnyMedium& medium, Attempt<>& attempt, std::map<std::string, FileSums> const& written, FilePlan const& plan, std::vector<std::pair<std::string, Bytes>> extra,
                    std::vector<std::pair<std::string, Value>> values, bool checksums_of_data) {
  CommitRecord& record = attempt.record();
  record.values = std::move(values);
  std::map<std::string, std::vector<std::uint64_t>> tables;
  for (auto const& file : plan.files)
    if (!written.contains(file.path)) throw Error{ErrorCode::incomplete, "nobody wrote this file"}.with_path(attempt.path() + '/' + file.path);
  auto const add = [&](std::string const& path, FileSums const& sums, bool data) {
    bool const summed = !data || checksums_of_data;
    FileChecksums checksums = finish_sums(path, sums, summed);
    std::uint64_t const size = medium.open_read(attempt.path() + '/' + path)->size();
    if (size != sums.size) throw Error{ErrorCode::incomplete, "the file has " + std::to_string(size) + " bytes, planned were " + std::to_string(sums.size)}.with_path(attempt.path() + '/' + path);
    record.files.push_back({path, sums.size, checksums.file, crc64(std::as_bytes(std::span{checksums.chunks})), data, summed});
    tables[path] = std::move(checksums.chunks);
  };
  for (auto const& [path, sums] : written) add(path, sums, true);

  std::vector<std::pair<std::string, Bytes>> small = plan.commit_files;
  for (auto& file : extra) small.push_back(std::move(file));
  Bytes large = large_values(record);
  if (!large.empty()) small.emplace_back(std::string{values_name}, std::move(large));
  for (auto const& [path, bytes] : small) {
    if (tables.contains(path) || path == record_name || path == checksums_name || path == lease_name)
      throw Error{ErrorCode::invalid_argument, "two files of the checkpoint would have the name " + path}.with_path(attempt.path() + '/' + path);
    attempt.write_file(path, bytes);
    WrittenSums<> sums;
    sums.add_empty(path, bytes.size());
    sums.add(path, bytes.size(), 0, bytes);
    add(path, sums.take().at(path), false);
  }
  std::sort(record.files.begin(), record.files.end(), [](RecordFile const& a, RecordFile const& b) { return a.path < b.path; });
  Bytes table;
  for (auto const& file : record.files) {
    auto const bytes = std::as_bytes(std::span{tables[file.path]});
    append(table, bytes);
  }
  attempt.write_file(std::string{checksums_name}, table);
  attempt.commit();
}

/// What ranks have agreed to save, and where which byte of it goes. Stays where it is: plans refer to it.
struct PlannedSave {
  AgreedState agreed;
  std::optional<PlannedState> plan;
  std::optional<CommitRecord> record;   // on rank 0; but for values and files
  std::string options;                  // in effect, in words
};

template <class = Deferred>
std::string options_in_words(AnyStorage const& storage, SaveSettings const& settings) {
  return std::string{storage.name()} + ' ' + storage.options_text() + (settings.if_exists == IfExists::replace ? " replace" : " fail") + (settings.check == Check::contents ? " check=contents" : "") +
         (settings.checksums ? "" : " checksums=none") + (settings.executor == Executor::process ? " executor=process" : "") + " writers_per_file=" + std::to_string(settings.writers_per_file) + options_text(settings.names);
}

/// Agreement and plan. Collective; nothing is touched.
///
/// `values`: becomes what is stored of values, on rank 0
template <class = Deferred>
std::shared_ptr<PlannedSave> agree_and_plan(CommRef comm, AnyStorage const& storage, PlaceRef const& place, StateDict const& state, SaveSettings const& settings, Stopwatch& watch, std::vector<std::pair<std::string, Value>>& values) {
  watch.enter("agree");
  auto planned = std::make_shared<PlannedSave>();
  planned->options = options_in_words(storage, settings);
  agree(comm, "save: agree", [&] {
    check_resources(settings.memory_bytes, settings.threads);
    if (settings.writers_per_file < 1) throw Error{ErrorCode::invalid_argument, "writers_per_file is " + std::to_string(settings.writers_per_file)};
  });
  planned->agreed = agree_state(comm, "save: agree", state, planned->options + " place=" + place.path, true, settings.names, settings.on);
  if (settings.check == Check::contents) compare_replicas(comm, planned->agreed);

  watch.enter("plan");
  // Values that files hold decide where what is in them.
  bool const first_values = storage.holds_values();
  if (first_values) {
    values = collect_values(comm, planned->agreed, agree(comm, "save: plan", [&] { return own_values(planned->agreed, comm.rank()); }));
    broadcast_values(comm, values);
  }
  Bytes own;
  planned->plan = agree(comm, "save: plan", [&] {
    if (!first_values) own = own_values(planned->agreed, comm.rank());
    PlannedState plan = PlannedState::of(planned->agreed, storage, comm.rank(), comm.size(), first_values ? &values : nullptr);
    if (comm.rank() == 0) planned->record = record_of(storage, planned->agreed, plan.stored(planned->agreed));
    return plan;
  });
  agree_on_recoding(comm, planned->plan->recoding.get());
  if (!first_values) values = collect_values(comm, planned->agreed, own);
  return planned;
}

/// What a report says of the state that was saved.
template <class = Deferred>
void describe_saved(PlannedSave const& planned, Report& report) {
  report.tensors = planned.agreed.tensors.size();
  report.values = planned.agreed.values.size();
  for (auto const& tensor : planned.agreed.tensors) report.tensor_bytes += bytes_of(tensor.dtype, tensor.layout.shape.elements());
  report.options = planned.options;
  planned.agreed.devices.warn(report.warnings);
}

template <class = Deferred>
Report save_state(CommRef comm, AnyStorage const& storage, PlaceRef const& place, StateDict const& state, SaveSettings const& settings) {
  Stopwatch watch;
  Report report;
  report.operation = "save";
  AnyMedium& medium = *place.medium;
  std::vector<std::pair<std::string, Value>> values;
  auto const planned = agree_and_plan(comm, storage, place, state, settings, watch, values);
  AgreedState const& agreed = planned->agreed;
  PlannedState const& plan = *planned->plan;
  if (plan.recoding) prepare_recoding(comm, *plan.recoding, agreed, plan.shares, settings, watch);

  watch.enter("attempt");
  std::unique_ptr<Attempt<>> attempt;
  std::vector<std::pair<std::string, Bytes>> extra;
  struct Opened {
    std::uint64_t block_bytes = 0;
    std::array<char, 16> id{};
  };
  try {
    Opened opened = agree(comm, "save: attempt", [&] {
      Opened result;
      if (comm.rank() != 0) return result;
      extra = storage.extra_files();
      if (plan.recoding) storage.describe(*plan.recoding, extra);
      std::vector<std::string> carried;
      for (auto const& [name, bytes] : extra) carried.push_back(name);
      attempt = std::make_unique<Attempt<>>(medium, place.path, settings.if_exists == IfExists::replace, carried, std::move(*planned->record));
      result.block_bytes = medium.block_bytes(attempt->path());
      std::copy_n(attempt->id().begin(), 16, result.id.begin());
      return result;
    });
    opened = broadcast_value(comm, opened, 0);
    std::string const id{opened.id.begin(), opened.id.end()};
    report.place = broadcast_text(comm, attempt ? attempt->place() : std::string{}, 0);
    report.id = id;
    std::string const directory = attempt_path(medium, report.place, id);
    require_shared(comm, medium, directory, id, settings.visible_within);
    SavePlan const writes = agree(comm, "save: plan", [&] {
      for (auto const& file : plan.files.files)
        if (auto const below = split_path('/' + file.path).first; below != "/" && (file.only_rank >= 0 || comm.rank() == 0)) medium.create_directories(directory + below);
      return plan.writes(agreed, comm.rank(), comm.size(), {opened.block_bytes, writers_per_file(medium, settings.writers_per_file)});
    });
    Writer<> writer{comm, medium, directory, writes, settings, watch};
    auto const sums = writer.run();

    watch.enter("commit");
    Bytes const all = reduce_to_root(comm, encode(sums), merge_sums<>, "save: commit");
    agree(comm, "save: commit", [&] {
      if (attempt) commit_attempt(medium, *attempt, decode_sums(all), plan.files, std::move(extra), std::move(values), settings.checksums);
    });
    watch.enter("publish");
    agree(comm, "save: publish", [&] {
      if (attempt) attempt->publish();
    });
  } catch (...) {
    if (attempt) attempt->abandon();
    throw;
  }
  if (attempt) {
    try {
      attempt->remove_old();
    } catch (Error const& error) {
      report.warnings.push_back("the old checkpoint could not be removed: " + error.message());
    }
  }
  describe_saved(*planned, report);
  watch.collect(comm, report);
  return report;
}

template <class S, class C>
struct verb_arguments : a_storage<S>, a_communicator<C> {};

}  // namespace detail

/// Writes `state` as one checkpoint. Collective: every rank of `comm` calls it with the same place, names and options.
///
/// Memory    stages at most options.memory_bytes per rank, whatever the size of a tensor; tensors are read, not changed
/// Durable   when it returns, on every rank: files and directory entries are synced
/// Throws    Error on all ranks if any rank failed; a checkpoint that was at the place is then still there, and still complete
/// Cost      every element is written once; replicated tensors are split over the ranks that hold them (plan/shares.hpp)
/// Example   dcp::save<dcp::SafeTensors>(world, "ckpt", {{"model", model}, {"step", step}}, {.if_exists = dcp::IfExists::replace});
template <class S, class C>
Report save(C& comm, place_of<S> const& place, StateDict const& state, SaveOptions<S> const& options = {}) {
  [[maybe_unused]] detail::verb_arguments<S, C> check;
  [[maybe_unused]] detail::a_writable_storage<detail::can_be_written<S>()> writable;
  if constexpr (Storage<S> && Communicator<C> && detail::can_be_written<S>()) {
    return detail::save_state(CommRef{comm}, *S::open(options.storage), S::locate(place), state, detail::settings_of(options));
  } else {
    return {};
  }
}

}  // namespace dcp
