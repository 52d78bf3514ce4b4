// SPDX-License-Identifier: Apache-2.0
#include "../support/comm_conformance.hpp"

#include <dcp/comm/communicator.hpp>

#include <doctest/doctest.h>

namespace {

/// The smallest thing that models the concept, and records what it was asked.
struct Recorder {
  std::string calls;

  int rank() const { return 0; }
  int size() const { return 1; }
  void barrier() { calls += "barrier "; }
  void broadcast(dcp::ByteSpan bytes, int root) { calls += "broadcast(" + std::to_string(bytes.size()) + ", " + std::to_string(root) + ") "; }
  void all_gather(dcp::ConstByteSpan mine, dcp::ByteSpan) { calls += "all_gather(" + std::to_string(mine.size()) + ") "; }
  std::vector<dcp::Message> exchange(std::vector<dcp::Message> outgoing) {
    calls += "exchange ";
    return outgoing;
  }
  Recorder split(int, int) { return {}; }
  void progress() { calls += "progress "; }
};
static_assert(dcp::Communicator<Recorder>);

struct NoExchange {
  int rank() const;
  int size() const;
  void barrier();
  void broadcast(dcp::ByteSpan, int);
  void all_gather(dcp::ConstByteSpan, dcp::ByteSpan);
  NoExchange split(int, int);
  void progress();
};
static_assert(!dcp::Communicator<NoExchange>);

}  // namespace

TEST_CASE("CommRef: passes every call on to what it borrows, and copies of it borrow the same") {
  Recorder recorder;
  dcp::CommRef const first{recorder};
  dcp::CommRef const comm = first;
  dcp::Bytes bytes(3);
  comm.barrier();
  comm.broadcast(bytes, 0);
  comm.all_gather(bytes, bytes);
  auto const back = comm.exchange({{0, bytes}});
  comm.progress();
  CHECK(recorder.calls == "barrier broadcast(3, 0) all_gather(3) exchange progress ");
  CHECK(comm.size() == 1);
  REQUIRE(back.size() == 1);
  CHECK(back[0].bytes == bytes);
}

TEST_CASE("name_ranks: few are all named, many are counted") {
  auto const name = [](int n) {
    std::vector<int> ranks;
    for (int i = 0; i < n; ++i) ranks.push_back(i + 1);
    return dcp::detail::name_ranks(ranks);
  };
  CHECK(name(1) == "rank 1");
  CHECK(name(2) == "ranks 1 and 2");
  CHECK(name(3) == "ranks 1, 2 and 3");
  CHECK(name(9) == "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 9");
  CHECK(name(10) == "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 2 more");
}
