// SPDX-License-Identifier: Apache-2.0
#pragma once
// What ranks do together, built from the operations of a communicator: agree on an outcome, collect, distribute, merge.
//
// Everything here is collective. The one rule that makes a failure harmless: a rank never skips an operation because of something
// that only it has seen. It takes part to the end of the step and says there what went wrong, and then all ranks throw the same
// Error. An Error of the communicator itself (a rank died) needs no agreement and passes through.

#include <dcp/base/config.hpp>
#include <dcp/comm/communicator.hpp>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>

namespace dcp {

/// Everyone's `value`, in rank order. Collective.
template <class T>
  requires std::is_trivially_copyable_v<T>
std::vector<T> all_gather_value(CommRef comm, T const& value) {
  std::vector<T> all(static_cast<std::size_t>(comm.size()));
  comm.all_gather(std::as_bytes(std::span{&value, 1}), std::as_writable_bytes(std::span{all}));
  return all;
}

/// The `value` of rank `root`, on every rank. Collective.
template <class T>
  requires std::is_trivially_copyable_v<T>
T broadcast_value(CommRef comm, T value, int root) {
  comm.broadcast(std::as_writable_bytes(std::span{&value, 1}), root);
  return value;
}

/// The smallest, largest value, and the sum, over all ranks. Collective; 8 bytes per rank.
template <class = Deferred>
std::uint64_t all_reduce_min(CommRef comm, std::uint64_t value) { return std::ranges::min(all_gather_value(comm, value)); }
template <class = Deferred>
std::uint64_t all_reduce_max(CommRef comm, std::uint64_t value) { return std::ranges::max(all_gather_value(comm, value)); }
template <class = Deferred>
std::uint64_t all_reduce_sum(CommRef comm, std::uint64_t value) {
  std::uint64_t sum = 0;
  for (std::uint64_t const part : all_gather_value(comm, value)) sum += part;
  return sum;
}

/// Makes `bytes` of rank `root` everyone's, whatever their size. Collective.
template <class = Deferred>
void broadcast_bytes(CommRef comm, Bytes& bytes, int root) {
  bytes.resize(static_cast<std::size_t>(broadcast_value<std::uint64_t>(comm, bytes.size(), root)));
  if (!bytes.empty()) comm.broadcast(bytes, root);
}

/// The `text` of rank `root`. Collective.
template <class = Deferred>
std::string broadcast_text(CommRef comm, std::string text, int root) {
  text.resize(static_cast<std::size_t>(broadcast_value<std::uint64_t>(comm, text.size(), root)));
  if (!text.empty()) comm.broadcast(std::as_writable_bytes(std::span{text}), root);
  return text;
}

/// Everyone's `mine`, in rank order; sizes may differ. Collective.
///
/// Cost      one gather of the sizes, then the first 2 * mean bytes of each rank in one all_gather (short ones padded) and what
///           longer ranks have beyond that by a broadcast each: at most twice the sum of the sizes travels
/// Memory    the result, and at most 64 MiB, or one byte per rank, for the padding
template <class = Deferred>
std::vector<Bytes> all_gather_bytes(CommRef comm, ConstByteSpan mine) {
  auto const sizes = all_gather_value<std::uint64_t>(comm, mine.size());
  std::uint64_t const ranks = sizes.size();
  std::uint64_t largest = 0, total = 0;
  for (std::uint64_t const size : sizes) {
    largest = std::max(largest, size);
    if (!checked_add(total, size, total)) throw Error{ErrorCode::overflow, "the ranks together want to gather more than 2^64 bytes"};
  }
  std::vector<Bytes> all(sizes.size());
  for (std::size_t i = 0; i < all.size(); ++i) all[i].resize(static_cast<std::size_t>(sizes[i]));

  constexpr std::uint64_t scratch = 64u << 20;
  std::uint64_t const common = std::min(largest, ceil_div(total, ranks) * 2);
  std::uint64_t const slab = std::min(common, std::max<std::uint64_t>(scratch / ranks, 1));
  Bytes padded(static_cast<std::size_t>(slab)), gathered(static_cast<std::size_t>(slab * ranks));
  for (std::uint64_t done = 0; done < common; done += slab) {
    auto const width = static_cast<std::size_t>(std::min(slab, common - done));
    auto const part_of = [&](auto bytes) {
      auto const from = std::min<std::size_t>(static_cast<std::size_t>(done), bytes.size());
      return bytes.subspan(from, std::min(width, bytes.size() - from));
    };
    std::ranges::copy(part_of(mine), padded.begin());
    comm.all_gather(ByteSpan{padded}.first(width), ByteSpan{gathered}.first(width * all.size()));
    for (std::size_t i = 0; i < all.size(); ++i) {
      auto const part = part_of(ByteSpan{all[i]});
      std::copy_n(gathered.begin() + static_cast<std::ptrdiff_t>(i * width), part.size(), part.begin());
    }
  }
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (sizes[i] <= common) continue;
    auto const rest = ByteSpan{all[i]}.subspan(static_cast<std::size_t>(common));
    if (static_cast<int>(i) == comm.rank()) std::ranges::copy(mine.subspan(static_cast<std::size_t>(common)), rest.begin());
    comm.broadcast(rest, static_cast<int>(i));
  }
  return all;
}

namespace detail {

// A rank's outcome in agree: the size of its encoded error, or one of these.
inline constexpr std::uint64_t outcome_ok = 0;
inline constexpr std::uint64_t outcome_no_memory = ~std::uint64_t{0};   // not even for saying what happened

template <class = Deferred>
std::uint64_t encode_outcome(std::exception_ptr const& failure, int rank, int size, std::string_view phase, Bytes& encoded) {
  if (!failure) return outcome_ok;
  try {
    try {
      std::rethrow_exception(failure);
    } catch (...) {
      encoded = current_error().with_rank(rank, size).with_phase(std::string{phase}).encode();
    }
    return encoded.size();
  } catch (...) {
    return outcome_no_memory;
  }
}

/// Returns when no rank has failed; else throws the error of the lowest rank that has.
template <class = Deferred>
void agree_on_outcome(CommRef comm, std::string_view phase, std::exception_ptr const& failure) {
  std::optional<Error> agreed;
  try {
    Bytes encoded;
    auto const mine = encode_outcome(failure, comm.rank(), comm.size(), phase, encoded);
    auto const outcomes = all_gather_value(comm, mine);
    auto const failed = std::ranges::find_if(outcomes, [](std::uint64_t outcome) { return outcome != outcome_ok; });
    if (failed == outcomes.end()) return;
    int const rank = static_cast<int>(failed - outcomes.begin());
    if (*failed == outcome_no_memory) {
      agreed = Error{ErrorCode::budget, "memory allocation failed"}.with_rank(rank, comm.size()).with_phase(std::string{phase});
    } else {
      encoded.resize(static_cast<std::size_t>(*failed));
      comm.broadcast(encoded, rank);
      agreed = Error::decode(encoded);
    }
  } catch (Error& error) {
    throw error.with_phase(std::string{phase});
  }
  throw *agreed;
}

}  // namespace detail

/// The result of `local()`, when it succeeds on every rank. Collective; `local` itself must not use the communicator.
///
/// Cost      8 bytes per rank; a broadcast of the error only when there is one
/// Throws    on all ranks, when `local` throws on any, the same Error: that of the lowest rank that failed, with rank and phase
/// Example   auto file = dcp::agree(comm, "save: open", [&] { return File::create(path); });
template <class F>
auto agree(CommRef comm, std::string_view phase, F&& local) {
  using R = std::invoke_result_t<F>;
  std::exception_ptr failure;
  if constexpr (std::is_void_v<R>) {
    try {
      local();
    } catch (...) {
      failure = std::current_exception();
    }
    detail::agree_on_outcome(comm, phase, failure);
  } else {
    std::optional<std::remove_cvref_t<R>> result;
    try {
      result.emplace(local());
    } catch (...) {
      failure = std::current_exception();
    }
    detail::agree_on_outcome(comm, phase, failure);
    return std::move(*result);
  }
}

/// Everyone's bytes merged in rank order; the result is rank 0's, other ranks get nothing. Collective.
///
/// Law       merge(a, b) is called with neighbours: a of ranks [i, j), b of ranks [j, k); so it need be associative only
/// Cost      a binomial tree: log2(size) exchanges, in each of which a rank receives or sends one message at most
/// Throws    on all ranks, when `merge` throws on any, the same Error, with that rank and the phase
/// Example   table = dcp::reduce_to_root(comm, std::move(table), [](Bytes a, Bytes b) { return xor_tables(std::move(a), b); });
template <class Merge>
Bytes reduce_to_root(CommRef comm, Bytes mine, Merge&& merge, std::string_view phase = "reduce") {
  std::exception_ptr failure;
  bool usable = true;   // of what this rank has merged so far; where it is not, silence says so up the tree
  std::int64_t const rank = comm.rank(), size = comm.size();
  try {
    for (std::int64_t step = 1; step < size; step *= 2) {
      bool const sends = rank % (2 * step) == step, receives = rank % (2 * step) == 0 && rank + step < size;
      std::vector<Message> outgoing;
      if (sends && usable) outgoing.push_back({static_cast<int>(rank - step), std::exchange(mine, {})});
      auto incoming = comm.exchange(std::move(outgoing));
      if (receives && incoming.empty()) usable = false;
      if (!receives || !usable) continue;
      try {
        mine = merge(std::move(mine), std::move(incoming.front().bytes));
      } catch (...) {
        failure = std::current_exception();
        usable = false;
      }
    }
  } catch (Error& error) {
    throw error.with_phase(std::string{phase});
  }
  detail::agree_on_outcome(comm, phase, failure);
  return mine;
}

}  // namespace dcp
