// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Medium needs  static constexpr bool renames_directories  - whether publish_new and exchange_directories can work
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#ifdef MISTAKE
struct MyMedium : dcp::Memory {
  bool renames_directories() const { return true; }
};
#else
struct MyMedium : dcp::Memory {
  static constexpr bool renames_directories = true;
};
#endif

void save_all(dcp::SelfComm& self, MyMedium const& medium, float& rate) { dcp::save<dcp::BasicSafeTensors<MyMedium>>(self, {medium, "ckpt"}, {{"rate", rate}}); }
int main() {}
