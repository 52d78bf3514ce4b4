// SPDX-License-Identifier: Apache-2.0
#pragma once
// One process, no launcher. The communicator to read first.

#include <dcp/base/config.hpp>
#include <dcp/comm/communicator.hpp>

#include <algorithm>

namespace dcp {

/// A group of one rank.
///
/// Example   dcp::SelfComm self;  dcp::load<dcp::SafeTensors>(self, "model", state);
class SelfComm {
 public:
  int rank() const { return 0; }
  int size() const { return 1; }
  void barrier() {}
  template <class = Deferred>
  void broadcast(ByteSpan, int root) { detail::check_root(root, 1); }
  template <class = Deferred>
  void all_gather(ConstByteSpan mine, ByteSpan all) {
    detail::check_all_gather(mine, all, 1);
    std::copy(mine.begin(), mine.end(), all.begin());
  }
  template <class = Deferred>
  std::vector<Message> exchange(std::vector<Message> outgoing) {
    detail::check_destinations(outgoing, 1);
    return outgoing;
  }
  SelfComm split(int, int) { return {}; }
  void progress() {}
};
static_assert(Communicator<SelfComm>);

}  // namespace dcp
