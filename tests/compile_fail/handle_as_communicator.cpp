// SPDX-License-Identifier: Apache-2.0
// As with an MPI library whose MPI_Comm is an int.
// error: dcp: a communicator needs  int rank() const  - which of the ranks 0 .. size() - 1 this one is
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/storage/safetensors.hpp>

#ifdef MISTAKE
using MyComm = int;
#else
using MyComm = dcp::SelfComm;
#endif

void save_all(MyComm& world, float& rate) { dcp::save<dcp::SafeTensors>(world, "ckpt", {{"rate", rate}}); }
int main() {}
