// SPDX-License-Identifier: Apache-2.0
#pragma once
// What every communicator must do, checked on any of them. The checks throw, and use no test framework: they run in threads, in
// forked processes and under mpirun alike, where an exception is what reaches the one who looks.

#include <dcp/comm/communicator.hpp>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace dcp::test {

inline void expect(bool holds, std::string const& sentence) {
  if (!holds) throw std::runtime_error{"not so: " + sentence};
}

/// Bytes that everyone can compute: what `rank` sends as number `index` of a run with `seed`.
inline Bytes pattern(std::size_t size, std::uint64_t seed, int rank, int index = 0) {
  std::uint64_t state = seed * 0x9E3779B97F4A7C15u + static_cast<std::uint64_t>(rank) * 1000003u + static_cast<std::uint64_t>(index) + 1;
  Bytes bytes(size);
  for (std::size_t at = 0; at < size; at += sizeof state) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    std::memcpy(bytes.data() + at, &state, std::min(sizeof state, size - at));
  }
  return bytes;
}

template <Communicator C>
void check_broadcast(C& comm, std::size_t size, std::uint64_t seed) {
  for (int root = 0; root < comm.size(); ++root) {
    Bytes const wanted = pattern(size, seed, root);
    Bytes bytes = comm.rank() == root ? wanted : Bytes(size);
    comm.broadcast(bytes, root);
    expect(bytes == wanted, "broadcast of " + std::to_string(size) + " bytes from rank " + std::to_string(root) + " arrives");
  }
}

template <Communicator C>
void check_all_gather(C& comm, std::size_t size, std::uint64_t seed) {
  Bytes all(size * static_cast<std::size_t>(comm.size())), wanted;
  comm.all_gather(pattern(size, seed, comm.rank()), all);
  for (int rank = 0; rank < comm.size(); ++rank) {
    Bytes const part = pattern(size, seed, rank);
    wanted.insert(wanted.end(), part.begin(), part.end());
  }
  expect(all == wanted, "all_gather of " + std::to_string(size) + " bytes per rank is in rank order");
}

/// Messages between random pairs (also to oneself, also several, also empty), of sizes from nothing to `largest`.
template <Communicator C>
void check_exchange(C& comm, std::size_t largest, double density, std::uint64_t seed) {
  auto const traffic = [&](int from, int to) {
    std::mt19937_64 random{seed ^ (static_cast<std::uint64_t>(from) << 32 | static_cast<std::uint64_t>(to))};
    std::vector<Bytes> messages;
    while (std::uniform_real_distribution<>{}(random) < density && messages.size() < 5) {
      std::size_t const bound = random() % 4 == 0 ? 1 : largest;
      messages.push_back(pattern(static_cast<std::size_t>(random() % bound), seed, from * 1000 + to, static_cast<int>(messages.size())));
    }
    return messages;
  };
  std::vector<std::vector<Bytes>> to_each;
  for (int to = 0; to < comm.size(); ++to) to_each.push_back(traffic(comm.rank(), to));
  std::vector<Message> outgoing, wanted;
  for (std::size_t index = 0; index < 5; ++index)   // destinations interleave, as a caller's loop over tensors makes them
    for (int to = 0; to < comm.size(); ++to)
      if (index < to_each[static_cast<std::size_t>(to)].size()) outgoing.push_back({to, to_each[static_cast<std::size_t>(to)][index]});
  for (int from = 0; from < comm.size(); ++from)
    for (Bytes& bytes : traffic(from, comm.rank())) wanted.push_back({from, std::move(bytes)});

  auto const incoming = comm.exchange(std::move(outgoing));
  expect(incoming.size() == wanted.size(), "exchange brings " + std::to_string(wanted.size()) + " messages; it brought " + std::to_string(incoming.size()));
  for (std::size_t i = 0; i < incoming.size(); ++i) {
    expect(incoming[i].rank == wanted[i].rank, "exchange orders what came in by sending rank");
    expect(incoming[i].bytes == wanted[i].bytes, "message " + std::to_string(i) + " of an exchange arrives, in the order sent");
  }
}

template <Communicator C>
void check_arguments(C& comm) {
  auto const refuses = [](auto call) {
    try {
      call();
    } catch (Error const& error) {
      return error.code() == ErrorCode::invalid_argument;
    }
    return false;
  };
  Bytes bytes(3);
  expect(refuses([&] { comm.broadcast(bytes, comm.size()); }), "a root that is no rank is refused");
  expect(refuses([&] { comm.broadcast(bytes, -1); }), "a negative root is refused");
  expect(refuses([&] { comm.all_gather(Bytes(2), bytes); }), "all_gather into a span of the wrong size is refused");
  expect(refuses([&] { (void)comm.exchange({{comm.size(), {}}}); }), "a message to a rank that is none is refused");
}

template <Communicator C>
void check_operations(C& comm, std::uint64_t seed) {
  expect(comm.rank() >= 0 && comm.rank() < comm.size(), "rank() is one of 0 .. size()-1");
  comm.barrier();
  check_arguments(comm);
  for (std::size_t const size : {0u, 1u, 8u, 4097u, 3u << 20}) check_broadcast(comm, size, seed + size);
  for (std::size_t const size : {0u, 1u, 8u, 4097u, (1u << 20) + 5}) check_all_gather(comm, size, seed + size);
  comm.progress();
  expect(comm.exchange({}).empty(), "an exchange of nothing brings nothing");
  for (std::uint64_t round = 0; round < 40; ++round) check_exchange(comm, 300, 0.4, seed + round);
  for (std::uint64_t round = 0; round < 3; ++round) check_exchange(comm, 3u << 20, 0.3, seed + 100 + round);
  for (int i = 0; i < 20; ++i) comm.barrier();
}

/// The whole suite. Collective; throws on a rank that sees something wrong, with the seed.
template <Communicator C>
void check_communicator(C& comm, std::uint64_t seed = 1) try {
  int const rank = comm.rank(), size = comm.size();
  check_operations(comm, seed);

  auto parity = comm.split(rank % 2, 0);
  expect(parity.size() == (size + 1 - rank % 2) / 2 && parity.rank() == rank / 2, "split by parity keeps the order of ranks");
  check_operations(parity, seed + 1000);

  auto reversed = comm.split(-7, -rank);   // any ints: colors and keys may be negative
  expect(reversed.size() == size && reversed.rank() == size - 1 - rank, "keys order the ranks of a group");
  check_exchange(reversed, 5000, 0.5, seed + 2000);

  auto half = parity.split(parity.rank() / 2, 0);   // of a group that was split itself; some have one rank
  check_exchange(half, 5000, 0.5, seed + 3000);
  check_all_gather(half, 100, seed);
  check_broadcast(parity, 100, seed);   // the older groups still work
  check_exchange(comm, 5000, 0.5, seed + 4000);
  comm.barrier();
} catch (std::exception const& error) {
  throw std::runtime_error{"rank " + std::to_string(comm.rank()) + " of " + std::to_string(comm.size()) + ", seed " + std::to_string(seed) + ": " +
                           error.what()};
}

}  // namespace dcp::test
