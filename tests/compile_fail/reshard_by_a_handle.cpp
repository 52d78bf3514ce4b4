// SPDX-License-Identifier: Apache-2.0
// error: dcp: a communicator needs  int rank() const  - which of the ranks 0 .. size() - 1 this one is
#include <dcp/checkpoint/reshard.hpp>
#include <dcp/comm/self.hpp>

#ifdef MISTAKE
using MyComm = int;
#else
using MyComm = dcp::SelfComm;
#endif

void move_all(MyComm& world, dcp::StateDict const& from, dcp::StateDict& to) { dcp::reshard(world, from, to); }
int main() {}
