// SPDX-License-Identifier: Apache-2.0
// error: dcp: a communicator needs  void barrier()  - returns when every rank has called it
#include <dcp/checkpoint/save.hpp>
#include <dcp/storage/safetensors.hpp>

struct MyComm {
  int rank() const { return 0; }
  int size() const { return 1; }
#ifndef MISTAKE
  void barrier() {}
#endif
  void broadcast(dcp::ByteSpan, int) {}
  void all_gather(dcp::ConstByteSpan mine, dcp::ByteSpan all) { std::copy(mine.begin(), mine.end(), all.begin()); }
  std::vector<dcp::Message> exchange(std::vector<dcp::Message> outgoing) { return outgoing; }
  MyComm split(int, int) { return {}; }
  void progress() {}
};

void save_all(MyComm& comm, float& rate) { dcp::save<dcp::SafeTensors>(comm, "ckpt", {{"rate", rate}}); }
int main() {}
