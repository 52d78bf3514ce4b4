// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the part of a save that happens behind the program is told, whichever thread or process does it.

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/run.hpp>
#include <dcp/formats/commit_record.hpp>
#include <dcp/io/staging_pool.hpp>
#include <dcp/media/medium.hpp>
#include <dcp/plan/save_plan.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

/// What a save in the background has reached.
struct SaveEvent {
  enum class Kind : std::uint8_t { staged, written, committed, failed, retired, drained } kind;
  std::string place;      // of the checkpoint
  std::int64_t step = -1; // of a manager's
  std::string error;      // of `failed`
};
/// Called on a thread of the library; `committed`, `retired` and `drained` (Tiered: in place in the far tier) on rank 0 only.
using SaveEventCallback = std::function<void(SaveEvent const&)>;

namespace detail {

/// What rank 0 needs besides for the commit.
struct CommitWork {
  std::shared_ptr<CommitRecord const> planned;   // but for run and sequence, values and files
  RecordRun run;                                 // on all ranks
  std::uint64_t sequence = 0;                    // at least
  std::vector<std::pair<std::string, Value>> values;
  std::vector<std::pair<std::string, Bytes>> extra;
  // Of a manager: where `latest` and retention are put right after it; a failure of that is a warning.
  std::string root;
  Retention retention;
  // Of a save to two tiers: what is done before that, and whose failure is one of the save. It calls what it is given whenever something has moved.
  std::function<void(std::function<void()> const&)> drain;
  bool drains = false;   // on all ranks

  /// Large where there are many tensors, and made behind the call.
  template <class = Deferred>
  CommitRecord record() const {
    CommitRecord made = *planned;
    made.run = run, made.sequence = sequence;
    return made;
  }
};

template <class>
class SaverProcess;

struct SaveJob {
  std::shared_ptr<AnyMedium> medium;
  std::string place, id;                          // resolved; of the attempt
  int rank = 0, ranks = 1;
  std::shared_ptr<FilePlan const> files;
  std::vector<std::uint32_t> empty_files;         // that this rank is to create
  std::uint64_t block_bytes = 4096;
  SaveSettings settings;
  std::shared_ptr<StagingPool<>> pool;            // that the bytes come from
  std::shared_ptr<SaverProcess<Deferred>> saver;  // that does it; nothing: this process
  CommitWork commit;                              // on rank 0
  SaveEventCallback events;
};

/// What another process needs of a job; the bytes to be written are not in it.
template <class = Deferred>
Bytes encode(SaveJob const& job) {
  ByteWriter out;
  out.text(job.place).text(job.id).number(job.rank).number(job.ranks).number(job.block_bytes);
  SaveSettings const& settings = job.settings;
  out.number(settings.if_exists).number(settings.checksums).number(settings.memory_bytes).number(settings.threads).number(settings.direct_io);
  out.number(settings.visible_within.count()).number(settings.deadline.count()).number(settings.low_io_priority);
  out.number<std::uint64_t>(job.files->files.size());
  for (auto const& file : job.files->files) out.text(file.path).number(file.size);
  out.number<std::uint64_t>(job.empty_files.size());
  for (auto const f : job.empty_files) out.number(f);
  if (job.rank != 0) return out.take();
  auto const small_files = [&](std::vector<std::pair<std::string, Bytes>> const& files) {
    out.number<std::uint64_t>(files.size());
    for (auto const& [name, bytes] : files) out.text(name).block(bytes);
  };
  small_files(job.files->commit_files);
  small_files(job.commit.extra);
  CommitRecord record = job.commit.record();
  record.values = job.commit.values;
  Bytes large;
  Bytes const written = write_record(record, large);
  out.block(written).block(large).text(job.commit.root);
  Retention const& retention = job.commit.retention;
  out.number(retention.keep_last).number(retention.keep_every).number(retention.keep_best).number(retention.best);
  return out.take();
}
/// Throws Error(corrupt) for what no encode() wrote.
template <class = Deferred>
SaveJob decode_job(ConstByteSpan bytes) {
  ByteReader in{bytes};
  SaveJob job;
  job.place = in.text(), job.id = in.text();
  job.rank = in.number<int>(), job.ranks = in.number<int>(), job.block_bytes = in.number<std::uint64_t>();
  SaveSettings& settings = job.settings;
  settings.if_exists = in.number<IfExists>(), settings.checksums = in.number<bool>(), settings.memory_bytes = in.number<std::uint64_t>();
  settings.threads = in.number<int>(), settings.direct_io = in.number<DirectIo>();
  settings.visible_within = std::chrono::milliseconds{in.number<std::chrono::milliseconds::rep>()}, settings.deadline = std::chrono::milliseconds{in.number<std::chrono::milliseconds::rep>()};
  settings.low_io_priority = in.number<bool>();
  auto const plan = std::make_shared<FilePlan>();
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) {
    PlannedFile& file = plan->files.emplace_back();
    file.path = in.text(), file.size = in.number<std::uint64_t>();
  }
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) job.empty_files.push_back(in.number<std::uint32_t>());
  if (job.rank == 0) {
    auto const small_files = [&](std::vector<std::pair<std::string, Bytes>>& files) {
      for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) {
        std::string name = in.text();
        auto const block = in.block();
        files.emplace_back(std::move(name), Bytes(block.begin(), block.end()));
      }
    };
    small_files(plan->commit_files);
    small_files(job.commit.extra);
    auto const record = in.block(), large = in.block();
    job.commit.root = in.text();
    Retention& retention = job.commit.retention;
    retention.keep_last = in.number<std::int64_t>(), retention.keep_every = in.number<std::int64_t>(), retention.keep_best = in.number<std::int64_t>(), retention.best = in.number<Best>();
    if (in.ok()) {
      auto const planned = std::make_shared<CommitRecord>(parse_record(record, large));
      job.commit.values = std::exchange(planned->values, {});
      job.commit.run = planned->run, job.commit.sequence = planned->sequence;
      job.commit.planned = planned;
    }
  }
  if (!in.done()) throw Error{ErrorCode::corrupt, "a damaged message about a save"};
  job.files = plan;
  return job;
}

template <class = Deferred>
Bytes encode(SaveEvent const& event) {
  return ByteWriter{}.number(event.kind).text(event.place).number(event.step).text(event.error).take();
}
template <class = Deferred>
SaveEvent decode_event(ConstByteSpan bytes) {
  ByteReader in{bytes};
  SaveEvent event{in.number<SaveEvent::Kind>(), in.text(), in.number<std::int64_t>(), {}};
  event.error = in.text();
  return event;
}

}  // namespace detail
}  // namespace dcp
