// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Medium needs  void sync_directory(std::string const& path)  - the names in it survive a crash
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#ifdef MISTAKE
struct MyMedium : dcp::Memory {
 private:
  using dcp::Memory::sync_directory;
};
#else
struct MyMedium : dcp::Memory {
 public:
  using dcp::Memory::sync_directory;
};
#endif

void save_all(dcp::SelfComm& self, MyMedium const& medium, float& rate) { dcp::save<dcp::BasicSafeTensors<MyMedium>>(self, {medium, "ckpt"}, {{"rate", rate}}); }
int main() {}
