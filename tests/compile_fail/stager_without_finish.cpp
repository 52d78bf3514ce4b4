// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Stager needs  static void finish(dcp::StagingWork&)  - the rest, which Pending::wait_staged does
#include <dcp/checkpoint/manager.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/storage/safetensors.hpp>

struct Mine {
  static constexpr std::string_view name = "mine";
  static void begin(dcp::StagingWork& work) { work.begin_copies(); }
#ifndef MISTAKE
  static void finish(dcp::StagingWork& work) { work.exchange(), work.finish_copies(); }
#endif
};

void save_all(dcp::SelfComm& self, float& rate) {
  dcp::CheckpointManager<dcp::SafeTensors, Mine> manager{self, "run"};
  manager.save(1, {{"rate", rate}});
}
int main() {}
