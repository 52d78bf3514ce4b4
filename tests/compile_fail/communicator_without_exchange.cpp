// SPDX-License-Identifier: Apache-2.0
// error: dcp: a communicator needs  std::vector<dcp::Message> exchange(std::vector<dcp::Message>)  - messages to any ranks, and those that came in
#include <dcp/checkpoint/save.hpp>
#include <dcp/storage/safetensors.hpp>

struct MyComm {
  int rank() const { return 0; }
  int size() const { return 1; }
  void barrier() {}
  void broadcast(dcp::ByteSpan, int) {}
  void all_gather(dcp::ConstByteSpan mine, dcp::ByteSpan all) { std::copy(mine.begin(), mine.end(), all.begin()); }
#ifndef MISTAKE
  std::vector<dcp::Message> exchange(std::vector<dcp::Message> outgoing) { return outgoing; }
#endif
  MyComm split(int, int) { return {}; }
  void progress() {}
};

void save_all(MyComm& comm, float& rate) { dcp::save<dcp::SafeTensors>(comm, "ckpt", {{"rate", rate}}); }
int main() {}
