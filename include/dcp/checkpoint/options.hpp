// SPDX-License-Identifier: Apache-2.0
#pragma once
// What saving and loading can be told. Aggregates for designated initialisers; everything has a default.

#include <dcp/base/checksum.hpp>
#include <dcp/base/config.hpp>
#include <dcp/core/name_map.hpp>
#include <dcp/device/driver.hpp>
#include <dcp/storage/storage.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace dcp {

enum class IfExists : std::uint8_t {
  fail,      // "Checkpoint already exists" on every rank, before a byte is written
  replace,   // the new checkpoint takes the old one's place when it is complete; until then the old one stays
};

/// How much ranks compare of what they should hold equally.
enum class Check : std::uint8_t {
  values,     // numbers, strings and other values that are not per_rank (a few bytes per value)
  contents,   // also replicated tensors: reads them all
};

enum class OnMissing : std::uint8_t { error, keep, zero };       // the state wants what the checkpoint lacks
enum class OnUnexpected : std::uint8_t { error, ignore };        // the checkpoint holds what the state lacks
enum class OnShape : std::uint8_t { error, keep };               // shapes differ
enum class OnDType : std::uint8_t { error, cast };               // dtypes differ; cast: between floats, and to integers that hold all values

enum class Verify : std::uint8_t {
  none,       // read only what is needed, compare nothing
  standard,   // whatever ranks read, completed to whole chunks where that is a bounded read; strided leftovers are counted as unverified
  full,       // every chunk that anything is read of; pieces that are stored twice are compared
};

/// Who does what a save in the background does behind the program.
enum class Executor : std::uint8_t {
  thread,    // threads of this process
  process,   // the program dcp-saver, one process per rank: a save that it was given whole is finished even if this process is killed. Local files only
};

/// Tells where a long operation is. Called on the rank's own thread, at most a few times per second.
struct Progress {
  std::string_view phase;
  std::uint64_t done, total;   // bytes of this rank in this phase
};
using ProgressCallback = std::function<void(Progress const&)>;

inline constexpr std::uint64_t default_memory_bytes = 256 << 20;
inline constexpr std::uint64_t least_memory_bytes = 16 << 20;
inline constexpr std::uint64_t default_staging_bytes = std::uint64_t{8} << 30;

template <class S>
struct SaveOptions {
  IfExists if_exists = IfExists::fail;
  Check check = Check::values;
  std::vector<DeviceStream> on = {};                             // the program's streams, of each device that has tensors: dcp::on(stream). Copies come after what is in them
  NameMap names = {};                                            // that the checkpoint is to have for the state's, and in which pieces
  bool checksums = true;                                         // of the tensors' bytes; without them a load cannot verify what it reads
  std::uint64_t memory_bytes = default_memory_bytes;             // of staging on this rank, at least 16 MiB
  int threads = 4;                                               // of this rank that write, each one write at a time
  DirectIo direct_io = DirectIo::automatic;                      // past the page cache: a load that follows at once reads from the disk
  std::int64_t writers_per_file = 16;                            // ranks that open one file; others send their bytes to them
  std::chrono::milliseconds visible_within = std::chrono::seconds{30};   // how long a rank waits to see what rank 0 made, on network file systems
  // Of saves in the background.
  std::uint64_t staging_bytes = default_staging_bytes;           // of the copy on this rank; a larger part is copied as fast as it is written
  std::chrono::milliseconds deadline = std::chrono::minutes{10}; // how long a rank may give no sign of life while others wait for it
  Executor executor = Executor::thread;
  std::string saver_program = {};                                // path of dcp-saver; if empty, what DCP_SAVER names, else beside this program, else in PATH
  bool low_io_priority = false;                                  // behind everything else that uses the disk, where its scheduler knows priorities (BFQ)
  ProgressCallback progress = {};
  typename detail::options_of<S>::type storage = {};
};

/// Policies for names under a prefix (whole components). The longest prefix that matches decides.
struct PrefixPolicy {
  std::string prefix;
  OnMissing on_missing = OnMissing::error;
  OnUnexpected on_unexpected = OnUnexpected::error;
  OnShape on_shape = OnShape::error;
  OnDType on_dtype = OnDType::error;
};

template <class S>
struct LoadOptions {
  OnMissing on_missing = OnMissing::error;
  OnUnexpected on_unexpected = OnUnexpected::error;
  OnShape on_shape = OnShape::error;
  OnDType on_dtype = OnDType::error;
  std::vector<PrefixPolicy> for_prefix = {};
  std::vector<DeviceStream> on = {};   // the program's streams, of each device that has tensors: dcp::on(stream). What is in them comes first
  NameMap names = {};       // that the checkpoint has for the state's, and in which pieces
  Verify verify = Verify::standard;
  bool read_once = false;   // what several ranks hold is read once and sent on: where ranks are nearer to each other than to the storage.
                            // Not large tensors of elements smaller than a byte whose rows end inside one: each rank reads those
  std::uint64_t memory_bytes = default_memory_bytes;
  int threads = 2;
  ProgressCallback progress = {};
  typename detail::options_of<S>::type storage = {};
};

// The options without their storage, for everything below the verbs.
using SaveSettings = SaveOptions<detail::no_options>;
using LoadSettings = LoadOptions<detail::no_options>;

namespace detail {
template <class S>
SaveSettings settings_of(SaveOptions<S> const& o) {
  return {o.if_exists, o.check, o.on, o.names, o.checksums, o.memory_bytes, o.threads, o.direct_io, o.writers_per_file, o.visible_within, o.staging_bytes, o.deadline, o.executor, o.saver_program, o.low_io_priority, o.progress, {}};
}
template <class S>
LoadSettings settings_of(LoadOptions<S> const& o) {
  return {o.on_missing, o.on_unexpected, o.on_shape, o.on_dtype, o.for_prefix, o.on, o.names, o.verify, o.read_once, o.memory_bytes, o.threads, o.progress, {}};
}
template <class = Deferred>
std::string options_text(NameMap const& names) {
  return names.empty() ? std::string{} : " names=" + std::to_string(crc64(as_byte_span(names.text())));
}
template <class = Deferred>
void check_resources(std::uint64_t memory_bytes, int threads) {
  if (memory_bytes < least_memory_bytes)
    throw Error{ErrorCode::budget, "a memory budget of " + std::to_string(memory_bytes) + " bytes; at least " + std::to_string(least_memory_bytes) + " are needed"};
  if (threads < 1 || threads > 1024) throw Error{ErrorCode::invalid_argument, std::to_string(threads) + " threads"};
}
}  // namespace detail

}  // namespace dcp
