// SPDX-License-Identifier: Apache-2.0
// Run under mpirun with 1, 2 and 4 processes. A plain program: a failed check throws, every rank says what failed on it, and the
// job returns 1.
#include "../support/comm_conformance.hpp"

#include <dcp/comm/agree.hpp>
#include <dcp/comm/mpi.hpp>

#include <chrono>
#include <cstdio>
#include <thread>

using namespace std::chrono_literals;
using dcp::test::expect;

namespace {

template <class F>
dcp::Error error_of(F&& step) {
  try {
    step();
  } catch (dcp::Error const& error) {
    return error;
  }
  throw std::runtime_error{"no Error was thrown"};
}

int world_rank() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}
int world_size() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

double seconds_of(auto step) {
  auto const start = std::chrono::steady_clock::now();
  step();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void does_what_every_communicator_must_do() {
  dcp::MpiComm world{MPI_COMM_WORLD, 30s};
  dcp::test::check_communicator(world, 11);
}

void pieces_of_any_size_are_put_together() {
  dcp::MpiComm world{MPI_COMM_WORLD, 30s, 4096};
  dcp::test::check_communicator(world, 12);

  dcp::MpiComm small{MPI_COMM_WORLD, 30s, 100};
  int const next = (small.rank() + 1) % small.size(), previous = (small.rank() + small.size() - 1) % small.size();
  std::vector<std::size_t> const sizes{0, 100, 99, 300, 0, 101, 200, 1};   // whole pieces are the special case
  std::vector<dcp::Message> outgoing;
  for (std::size_t const size : sizes) outgoing.push_back({next, dcp::test::pattern(size, 5, small.rank())});
  auto const incoming = small.exchange(std::move(outgoing));
  expect(incoming.size() == sizes.size(), "as many messages arrive as were sent");
  for (std::size_t i = 0; i < sizes.size(); ++i)
    expect(incoming[i].rank == previous && incoming[i].bytes == dcp::test::pattern(sizes[i], 5, previous), "message " + std::to_string(i) + " is whole");
}

void many_communicators_come_and_go() {
  for (int i = 0; i < 300; ++i) {
    dcp::MpiComm world{MPI_COMM_WORLD, 1s};
    world.barrier();
    if (i % 30 == world_rank()) std::this_thread::sleep_for(70ms);   // time for a beat, just before they are destroyed
    world.progress();
    auto part = world.split(world.rank() % 2, 0);
    part.barrier();
    dcp::MpiComm moved = std::move(part);
    moved = moved.split(0, 0);
    moved.barrier();
  }
}

void an_agreed_error_is_the_same_everywhere() {
  dcp::MpiComm world{MPI_COMM_WORLD, 30s};
  int const last = world.size() - 1;
  auto const error = error_of([&] {
    dcp::agree(world, "save: write", [&] {
      if (world.rank() == last) throw dcp::Error{dcp::ErrorCode::io, "no space"}.with_path("f");
    });
  });
  expect(error.rank() == last && error.code() == dcp::ErrorCode::io && error.path() == "f", "agree throws the error of the rank that failed");
  auto const texts = dcp::all_gather_bytes(world, dcp::as_byte_span(error.what()));
  for (auto const& text : texts) expect(dcp::as_text(text) == error.what(), "all ranks throw the same text");
  auto const all = dcp::reduce_to_root(world, dcp::Bytes(1, static_cast<std::byte>(world.rank())), [](dcp::Bytes a, dcp::Bytes const& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  });
  expect(all.size() == (world.rank() == 0 ? static_cast<std::size_t>(world.size()) : 0), "reduce_to_root collects on rank 0");
}

void progress_of_a_rank_keeps_the_others_waiting() {
  dcp::MpiComm world{MPI_COMM_WORLD, 500ms};
  double const waited = seconds_of([&] {
    if (world.rank() == world.size() - 1)
      for (int i = 0; i < 60; ++i) std::this_thread::sleep_for(20ms), world.progress();
    world.barrier();
  });
  expect(waited > 1.1, "the slow rank took two deadlines and nobody gave up");
}

void a_rank_that_does_not_come_is_named_and_poisons_all() {
  if (world_size() == 1) return;
  MPI_Comm other;   // a barrier of our own at the end, since this MpiComm is of no use then
  MPI_Comm_dup(MPI_COMM_WORLD, &other);
  dcp::MpiComm world{MPI_COMM_WORLD, 500ms};
  world.barrier();
  if (world.rank() == 1) std::this_thread::sleep_for(2s);
  dcp::Bytes bytes(100), all(100 * static_cast<std::size_t>(world.size()));
  double const waited = seconds_of([&] {
    auto const error = error_of([&] { world.all_gather(bytes, all); });
    expect(error.code() == dcp::ErrorCode::timeout && error.rank() == 1, "rank 1 is named");
    expect(error.message() == "no rank made progress for 500 ms; all_gather still waits for rank 1", "the message says so: " + error.message());
    expect(error_of([&] { world.barrier(); }).what() == std::string{error.what()}, "poisoned: the same Error at once");
  });
  expect(waited < 1.9, "nobody waits much longer than the deadline");
  MPI_Barrier(other);
  MPI_Comm_free(&other);
}

void a_rank_that_leaves_with_an_exception_is_noticed_at_once() {
  if (world_size() == 1) return;
  double const waited = seconds_of([] {
    auto const error = error_of([] {
      dcp::MpiComm world{MPI_COMM_WORLD, 20s};
      world.barrier();
      if (world.rank() == 0) throw dcp::Error{dcp::ErrorCode::io, "mine"};
      (void)world.exchange({{0, dcp::Bytes(10)}});
    });
    if (world_rank() == 0) expect(error.message() == "mine", "the rank that failed has its own exception");
    else expect(error.code() == dcp::ErrorCode::rank_failed && error.rank() == 0, "the others throw rank_failed");
  });
  expect(waited < 10, "it does not take the deadline");
}

void a_rank_that_closes_early_is_noticed_and_an_operation_that_all_entered_succeeds() {
  if (world_size() == 1) return;
  for (int i = 0; i < 20; ++i) {
    auto world = std::make_unique<dcp::MpiComm>(MPI_COMM_WORLD, 20s);
    world->barrier();
    if (world->rank() != 1) {
      auto const error = error_of([&] { world->barrier(); });
      expect(error.code() == dcp::ErrorCode::rank_failed && error.rank() == 1, "rank 1 is known to have left");
    }
    world.reset();
    MPI_Barrier(MPI_COMM_WORLD);
  }
}

void ranks_that_make_no_communicator_are_a_timeout() {
  if (world_size() == 1) return;
  MPI_Comm other;
  MPI_Comm_dup(MPI_COMM_WORLD, &other);   // never freed: a duplication of it stays pending
  if (world_rank() != 0) expect(error_of([&] { dcp::MpiComm{other, 300ms}; }).code() == dcp::ErrorCode::timeout, "the others give up");
}

}  // namespace

int main(int argc, char** argv) {
  expect(error_of([] { dcp::MpiComm{MPI_COMM_WORLD}; }).code() == dcp::ErrorCode::invalid_argument, "an MpiComm needs MPI_Init");
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  std::unique_ptr<dcp::MpiComm> outlives_mpi = std::make_unique<dcp::MpiComm>(MPI_COMM_WORLD);
  outlives_mpi->barrier();

  int failed = 0;
  auto const run = [&](char const* name, void (*test)()) {
    int mine = 0;
    double const seconds = seconds_of([&] {
      try {
        test();
      } catch (std::exception const& error) {
        std::fprintf(stderr, "FAILED %s, rank %d: %s\n", name, world_rank(), error.what());
        mine = 1;
      }
    });
    int any = 0;
    MPI_Allreduce(&mine, &any, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    failed |= any;
    if (world_rank() == 0) std::printf("%s %s (%.2f s)\n", any != 0 ? "FAILED" : "ok", name, seconds);
  };
#define RUN(test) run(#test, test)
  RUN(does_what_every_communicator_must_do);
  RUN(pieces_of_any_size_are_put_together);
  RUN(many_communicators_come_and_go);
  RUN(an_agreed_error_is_the_same_everywhere);
  RUN(progress_of_a_rank_keeps_the_others_waiting);
  RUN(a_rank_that_does_not_come_is_named_and_poisons_all);
  RUN(a_rank_that_leaves_with_an_exception_is_noticed_at_once);
  RUN(a_rank_that_closes_early_is_noticed_and_an_operation_that_all_entered_succeeds);
  RUN(ranks_that_make_no_communicator_are_a_timeout);
#undef RUN
  MPI_Finalize();
  outlives_mpi.reset();   // after MPI_Finalize: MPI is not called any more
  return failed;
}
