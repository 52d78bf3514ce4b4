// SPDX-License-Identifier: Apache-2.0
#pragma once
// Tiered: the checkpoints of a run in two tiers, a near one that is quick to write and to read, and a far one that outlives it (a local disk and an object
// store). Every save commits in the near tier first, as any save does; then rank 0 copies it to the far tier, behind the program, where it commits under an attempt of
// its own. So:
//   1. what either tier holds is a complete checkpoint, or nothing: no tier depends on the other;
//   2. the far tier gets what the near tier's checksums say, or an error;
//   3. at most one checkpoint is on its way: the next save of the program waits for it (or fails, or is skipped: if_busy);
//   4. what a crash, or a far tier that did not answer, kept from being copied is copied by the next save, as far as the near tier still has it.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/exchange.hpp>
#include <dcp/checkpoint/file_writer.hpp>
#include <dcp/checkpoint/manager.hpp>
#include <dcp/checkpoint/open.hpp>
#include <dcp/checkpoint/place.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/plan/save_plan.hpp>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace dcp {

template <class Near>
struct TieredOptions {
  ManagerOptions<Near> near = {};
  // Retention of the far tier, as in ManagerOptions; what is best says `near`.
  std::int64_t keep_last = 0, keep_every = 0, keep_best = 0;
};

namespace detail {

/// Copies a committed checkpoint to a place where none is, on any medium, and commits it there. Every byte is compared with the checksums of the record, if it has
/// them, before that. By one rank.
///
/// `moved`  is called, on any thread, whenever something was copied
template <class = Deferred>
void copy_checkpoint(AnyMedium& from, std::string const& place, AnyMedium& to, std::string const& target, SaveSettings const& settings, std::function<void()> const& moved) {
  Located const located = locate_checkpoint(from, place);
  if (!located.record) throw Error{ErrorCode::not_found, "there is no checkpoint of this library"}.with_path(place);
  std::string const data = located.directory + '/';
  Bytes large;
  std::vector<std::pair<std::string, Bytes>> small;
  FilePlan plan;
  std::map<std::string, RecordFile const*> listed;
  bool summed = true;
  for (auto const& file : located.record->files) {
    if (file.data) {
      plan.files.push_back({file.path, file.size, {}, -1});
      listed[file.path] = &file;
      summed = summed && file.summed;
      continue;
    }
    Bytes bytes = read_file(from, data + file.path, most_record_bytes);
    if (bytes.size() != file.size || crc64(bytes) != file.crc) throw Error{ErrorCode::corrupt, "the file does not have the size and checksum of the commit record"}.with_path(data + file.path);
    if (file.path == values_name) large = std::move(bytes);
    else small.emplace_back(file.path, std::move(bytes));
  }
  CommitRecord record = parse_record(located.record_bytes, large);
  auto values = std::move(record.values);
  record.values.clear(), record.files.clear(), record.directory.clear();

  Attempt<> attempt{to, target, false, {}, std::move(record)};
  try {
    std::map<std::string, FileSums> sums;
    {
      SaveSettings how = settings;
      how.checksums = summed;
      std::vector<std::unique_ptr<ReadableFile>> sources;   // before what reads them
      FileWriter<> writer{to, attempt.path(), plan.files, to.block_bytes(attempt.path()), how};
      for (std::uint32_t f = 0; f < plan.files.size(); ++f) {
        PlannedFile const& file = plan.files[f];
        if (auto const below = split_path('/' + file.path).first; below != "/") to.create_directories(attempt.path() + below);
        ReadableFile& source = *sources.emplace_back(from.open_read(data + file.path));
        require_size(source, data + file.path, file.size);
        if (file.size == 0) writer.create(f);
        for_each_piece({0, file.size}, writer.buffer_bytes(), [&](std::uint64_t at, std::uint64_t end) {
          writer.write(f, {at, end}, [&source, &moved](std::uint64_t position, ByteSpan part) {
            source.read_at(position, part);
            moved();
          });
        });
      }
      sums = writer.finish(moved, [] {});
    }
    for (auto const& [path, sum] : sums)
      if (summed && finish_sums(path, sum, true).file != listed.at(path)->crc) throw Error{ErrorCode::corrupt, "the file does not have the checksum of the commit record, and is not copied"}.with_path(data + path);
    commit_attempt(to, attempt, sums, plan, std::move(small), std::move(values), summed);
    attempt.publish();
  } catch (...) {
    attempt.abandon();
    throw;
  }
}

/// The far tier, as rank 0 sees it.
template <class = Deferred>
struct FarTier {
  std::shared_ptr<Run<>> run;
  SaveSettings settings;
  Retention retention;
  SaveEventCallback events;

  std::uint64_t newest() const {
    auto const all = run->checkpoints();
    return all.empty() ? 0 : all.back().sequence;
  }
  /// What the near tier has and this one lacks, oldest first; not what is older than all here, which may have been retired.
  void drain(Run<> const& near, std::function<void()> const& moved) const {
    std::uint64_t const newest_here = newest();
    std::exception_ptr failure;
    for (auto const& one : near.checkpoints()) {
      if (one.sequence <= newest_here) continue;
      std::string const target = run->place_of_step(one.run.step);
      try {
        copy_checkpoint(near.medium(), one.place, run->medium(), target, settings, moved);
        tell({SaveEvent::Kind::drained, target, one.run.step, {}});
      } catch (...) {
        if (!failure) failure = std::current_exception();   // one that is damaged must not keep newer ones from being copied
      }
    }
    if (failure) std::rethrow_exception(failure);
    for (auto const& gone : run->settle(retention)) tell({SaveEvent::Kind::retired, gone.place, gone.run.step, {}});
  }

 private:
  void tell(SaveEvent const& event) const noexcept {
    try {
      if (events) events(event);
    } catch (...) {
      // It is told, not asked.
    }
  }
};

}  // namespace detail

/// A CheckpointManager of two tiers of one format, `Near` and `Far`. Every member is collective. `comm` must outlive it.
///
/// Saved     save() and Pending::wait() return when both tiers have the checkpoint, each durably and by its own commit record. If the far tier fails, they
///           throw its Error; the near tier then has the checkpoint all the same, and the next save copies it too
/// Loaded    from the near tier; if it has none or it is damaged, from the far tier, with the same checksums, and the report says why
/// Retired   by each tier for itself. The near one does not wait for the far one: keep_last there is how many saves the far tier may miss
/// Events    `committed` when the near tier has a checkpoint, `drained` when the far tier has it; the report's phase "drain" says what that took
/// Example   dcp::Tiered<dcp::SafeTensors, dcp::BasicSafeTensors<dcp::ObjectStore>> checkpoints{world, "run", {store, "bucket/run"}, {.near = {.keep_last = 2}}};
///           if (auto const step = checkpoints.latest()) checkpoints.load(*step, state);
///           for (...) { train(); auto pending = checkpoints.async_save(step, state); }
///           checkpoints.wait();
template <class Near, class Far>
class Tiered : detail::a_storage<Far> {
  static_assert(std::is_same_v<typename Near::Options, typename Far::Options>, "dcp: the two tiers of Tiered hold one format; give the same storage over two media");

 public:
  template <class C>
  Tiered(C& comm, place_of<Near> const& near, place_of<Far> const& far, TieredOptions<Near> options = {})
      : comm_{comm}, near_options_{options.near}, near_{comm, near, std::move(options.near)} {
    agree(comm_, "manager", [&] {
      if (options.keep_last < 0 || options.keep_every < 0 || options.keep_best < 0) throw Error{ErrorCode::invalid_argument, "retention with a negative number"};
      if (options.keep_last == 0 && (options.keep_every > 0 || options.keep_best > 0))
        throw Error{ErrorCode::invalid_argument, "keep_every and keep_best keep what keep_last would let go; with keep_last = 0 everything is kept"};
    });
    far_ = detail::claim_root(comm_, Far::locate(far), far_lease_, near_options_.save.deadline);
    auto const tier = std::make_shared<detail::FarTier<>>(detail::FarTier<>{far_, detail::settings_of(near_options_.save), {options.keep_last, options.keep_every, options.keep_best, near_options_.best}, near_options_.events});
    std::uint64_t const newest = agree(comm_, "manager", [&] { return comm_.rank() == 0 ? tier->newest() : 0; });
    near_.next_ = std::make_shared<detail::NextTier>(detail::NextTier{newest, [tier](detail::Run<> const& run, std::function<void()> const& moved) { tier->drain(run, moved); }});
  }

  Report save(std::int64_t step, StateDict const& state, std::optional<double> metric = {}) { return near_.save(step, state, metric); }
  Pending async_save(std::int64_t step, StateDict const& state, std::optional<double> metric = {}) { return near_.async_save(step, state, metric); }

  /// Loads the checkpoint of `step` from the first tier that can give it. Throws the near tier's Error if the far one has none.
  Report load(std::int64_t step, StateDict const& state) { return load(step, state, near_options_.load); }
  Report load(std::int64_t step, StateDict const& state, LoadOptions<Near> const& options) {
    // Every rank throws the same.
    std::optional<Error> near_failure;
    try {
      return near_.load(step, state, options);
    } catch (Error const& error) {
      near_failure = error;
    }
    try {
      Report report = detail::load_state(comm_, *Far::open(options.storage), {std::shared_ptr<AnyMedium>{far_, &far_->medium()}, far_->place_of_step(step)}, state, detail::settings_of(options));
      report.warnings.push_back("loaded from the far tier; the near one: " + near_failure->message());
      return report;
    } catch (Error const& error) {
      if (error.code() == ErrorCode::not_found) throw *near_failure;
      throw;
    }
  }

  /// The step of the newest checkpoint in either tier, by commit; nothing if there is none.
  std::optional<std::int64_t> latest() {
    auto const all = found();
    if (all.empty()) return std::nullopt;
    return std::max_element(all.begin(), all.end(), [](auto const& a, auto const& b) { return a.second < b.second; })->first;
  }
  /// The steps that have a checkpoint in either tier, in ascending order.
  std::vector<std::int64_t> steps() {
    std::vector<std::int64_t> steps;
    for (auto const& [step, sequence] : found()) steps.push_back(step);
    return steps;
  }
  /// The same for the near tier alone.
  std::vector<std::int64_t> near_steps() { return near_.steps(); }

  /// In both tiers.
  void pin(std::int64_t step) { change_pins(step, true); }
  void unpin(std::int64_t step) { change_pins(step, false); }

  void wait() { near_.wait(); }
  /// As of a CheckpointManager: true when both tiers have what was saved.
  template <class Rep, class Period>
  bool flush(std::chrono::duration<Rep, Period> time) { return near_.flush(time); }

 private:
  std::map<std::int64_t, std::uint64_t> found() {
    Bytes text = agree(comm_, "manager", [&] {
      ByteWriter out;
      if (comm_.rank() == 0)
        for (auto const* run : {near_.run_.get(), far_.get()})
          for (auto const& one : run->checkpoints()) out.number(one.run.step).number(one.sequence);
      return out.take();
    });
    broadcast_bytes(comm_, text, 0);
    std::map<std::int64_t, std::uint64_t> found;
    for (ByteReader in{text}; !in.done() && in.ok();) {
      auto& sequence = found[in.number<std::int64_t>()];
      sequence = std::max(sequence, in.number<std::uint64_t>());
    }
    return found;
  }
  void change_pins(std::int64_t step, bool pinned) {
    near_.change_pins(step, pinned);
    agree(comm_, "manager", [&] {
      if (comm_.rank() != 0) return;
      auto steps = far_->pins();
      std::erase(steps, step);
      if (pinned) steps.push_back(step);
      std::sort(steps.begin(), steps.end());
      far_->set_pins(steps);
    });
  }

  CommRef comm_;
  ManagerOptions<Near> near_options_;
  CheckpointManager<Near> near_;
  std::unique_ptr<Lease> far_lease_;                    // on rank 0
  std::shared_ptr<detail::Run<>> far_;
};

}  // namespace dcp
