// SPDX-License-Identifier: Apache-2.0
#pragma once
// The one exception type of the library: a code for programs, fields for people.

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>

#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

namespace dcp {

enum class ErrorCode : std::uint8_t {
  unknown,            // an exception of another type, passed on from a rank
  invalid_argument,   // the call itself is wrong
  io,                 // the system refused an operation; system_error() has errno
  not_found,          // no checkpoint there
  already_exists,     // a checkpoint is there and if_exists is fail
  unsupported,        // the medium or format cannot do this
  not_shared,         // ranks do not see the same directory
  rank_failed,        // a rank left, died or stopped answering
  timeout,            // nobody made progress until the deadline
  ranks_disagree,     // arguments that must be equal on all ranks are not
  missing_entry,      // the state wants what the checkpoint lacks
  unexpected_entry,   // the checkpoint has what the state lacks
  shape_mismatch,     //
  dtype_mismatch,     //
  kind_mismatch,      // a tensor where a value is wanted, or the reverse
  duplicate_entry,    // one name, two entries
  overlapping_memory, // two tensors share memory without being tied
  incomplete,         // stored pieces do not cover the tensor, or bytes were not written
  corrupt,            // checksum or size differs from the commit record
  budget,             // the memory budget is too small
  // Faults of a file (names: the catalogue of malformed inputs)
  truncated,
  bad_header_length,
  bad_utf8,
  bad_json,
  bad_schema,
  bad_version,
  duplicate_key,
  unsupported_dtype,
  overflow,
  bad_offsets,
  size_mismatch,
  misaligned,
  trailing_data,
  unsafe_path,
  missing_file,
  missing_tensor,
  index_mismatch,
  limit,
  busy,               // a save is still under way
  cancelled,          // by its own program
  changed,            // memory that was to stay as it was while it was copied
  bad_magic,          // of a file that begins with something else
  quant_mismatch,     // parts of a quantized tensor, or what a configuration says of it, contradict each other
  device,             // a device, or the driver of it, refused or failed
};

inline constexpr std::array error_code_names{
    "unknown",         "invalid_argument", "io",             "not_found",       "already_exists",     "unsupported",   "not_shared", "rank_failed",
    "timeout",         "ranks_disagree",   "missing_entry",  "unexpected_entry", "shape_mismatch",    "dtype_mismatch", "kind_mismatch", "duplicate_entry",
    "overlapping_memory", "incomplete",    "corrupt",        "budget",          "truncated",          "bad_header_length", "bad_utf8", "bad_json",
    "bad_schema",      "bad_version",      "duplicate_key",  "unsupported_dtype", "overflow",         "bad_offsets",   "size_mismatch", "misaligned",
    "trailing_data",   "unsafe_path",      "missing_file",   "missing_tensor",  "index_mismatch",     "limit",         "busy",       "cancelled",
    "changed",         "bad_magic",        "quant_mismatch", "device"};
static_assert(error_code_names.size() == static_cast<std::size_t>(ErrorCode::device) + 1);

inline std::string_view to_string(ErrorCode code) { return error_code_names[static_cast<std::size_t>(code)]; }

/// What every operation of the library throws. After a collective one, every rank throws an Error with the same fields.
///
/// what()    "dcp: <what is wrong>" and one line per further fact that is known
/// Example   catch (dcp::Error const& e) { if (e.code() == dcp::ErrorCode::already_exists) ... else std::cerr << e.what(); }
class Error : public std::exception {
 public:
  template <class = Deferred>
  Error(ErrorCode code, std::string message) : state_{std::make_shared<State>()} {
    state_->code = code;
    state_->message = std::move(message);
    format();
  }

  char const* what() const noexcept override { return state_->what.c_str(); }
  ErrorCode code() const noexcept { return state_->code; }
  std::string const& message() const noexcept { return state_->message; }
  int rank() const noexcept { return state_->rank; }                     // the rank that failed first, -1 if that is not known
  std::string const& phase() const noexcept { return state_->phase; }    // what the ranks were doing, e.g. "save: write"
  std::string const& path() const noexcept { return state_->path; }
  int system_error() const noexcept { return state_->system_error; }     // errno, 0 if the system was not involved
  std::string const& hint() const noexcept { return state_->hint; }

  // Facts are added where they are known and only once: the first to say something is the closest to the cause.
  template <class = Deferred>
  Error& with_rank(int rank, int ranks, std::string note = {}) {
    if (state_->rank < 0) edit([&](State& s) { s.rank = rank, s.ranks = ranks, s.rank_note = std::move(note); });
    return *this;
  }
  template <class = Deferred>
  Error& with_phase(std::string phase) {
    if (state_->phase.empty()) edit([&](State& s) { s.phase = std::move(phase); });
    return *this;
  }
  template <class = Deferred>
  Error& with_path(std::string path) {
    if (state_->path.empty()) edit([&](State& s) { s.path = std::move(path); });
    return *this;
  }
  template <class = Deferred>
  Error& with_range(std::uint64_t begin, std::uint64_t end) {
    if (state_->begin == state_->end) edit([&](State& s) { s.begin = begin, s.end = end; });
    return *this;
  }
  template <class = Deferred>
  Error& with_errno(int code) {
    if (state_->system_error == 0) edit([&](State& s) { s.system_error = code; });
    return *this;
  }
  template <class = Deferred>
  Error& with_hint(std::string hint) {
    if (state_->hint.empty()) edit([&](State& s) { s.hint = std::move(hint); });
    return *this;
  }

  // The fields as a message to other ranks.
  template <class = Deferred>
  Bytes encode() const {
    ByteWriter out;
    out.number(state_->code).text(state_->message).number(state_->rank).number(state_->ranks).text(state_->rank_note).text(state_->phase);
    out.text(state_->path).number(state_->begin).number(state_->end).number(state_->system_error).text(state_->hint);
    return out.take();
  }
  template <class = Deferred>
  static Error decode(ConstByteSpan bytes) {
    ByteReader in{bytes};
    auto const code = in.number<ErrorCode>();
    Error error{static_cast<std::size_t>(code) < error_code_names.size() ? code : ErrorCode::unknown, in.text()};
    State& s = *error.state_;
    s.rank = in.number<int>(), s.ranks = in.number<int>(), s.rank_note = in.text(), s.phase = in.text(), s.path = in.text();
    s.begin = in.number<std::uint64_t>(), s.end = in.number<std::uint64_t>(), s.system_error = in.number<int>(), s.hint = in.text();
    error.format();
    return error;
  }

 private:
  struct State {
    ErrorCode code{};
    int rank = -1, ranks = 0, system_error = 0;
    std::uint64_t begin = 0, end = 0;
    std::string message, rank_note, phase, path, hint, what;
  };
  std::shared_ptr<State> state_;   // shared, because copying an exception must not throw

  template <class F>
  void edit(F change) {
    state_ = std::make_shared<State>(*state_);
    change(*state_);
    format();
  }

  template <class = Deferred>
  void format() {
    State& s = *state_;
    s.what = "dcp: " + s.message + "\n  code      " + std::string{to_string(s.code)};
    if (s.rank >= 0) {
      s.what += "\n  rank      " + std::to_string(s.rank) + " of " + std::to_string(s.ranks);
      if (!s.rank_note.empty()) s.what += " (" + s.rank_note + ")";
      if (s.ranks > 2) s.what += "; the other " + std::to_string(s.ranks - 1) + " ranks stopped with it";
      if (s.ranks == 2) s.what += "; the other rank stopped with it";
    }
    if (!s.phase.empty()) s.what += "\n  during    " + s.phase;
    if (!s.path.empty()) {
      s.what += "\n  file      " + s.path;
      if (s.begin != s.end) s.what += ", bytes [" + std::to_string(s.begin) + ", " + std::to_string(s.end) + ")";
    }
    if (s.system_error != 0) s.what += "\n  system    " + std::string{std::strerror(s.system_error)} + " (errno " + std::to_string(s.system_error) + ")";
    if (!s.hint.empty()) s.what += "\n  hint      " + s.hint;
  }
};

/// The exception in flight as an Error; call inside a catch block.
template <class = Deferred>
Error current_error() {
  try {
    throw;
  } catch (Error const& error) {
    return error;
  } catch (std::bad_alloc const&) {
    return Error{ErrorCode::budget, "memory allocation failed"};
  } catch (std::exception const& other) {
    return Error{ErrorCode::unknown, other.what()};
  } catch (...) {
    return Error{ErrorCode::unknown, "an exception that is no std::exception"};
  }
}

}  // namespace dcp
