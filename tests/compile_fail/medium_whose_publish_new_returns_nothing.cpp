// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Medium needs  bool publish_new(std::string const& from, std::string const& to)  - renames a directory, false if `to` is there
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#ifdef MISTAKE
struct MyMedium : dcp::Memory {
  void publish_new(std::string const& from, std::string const& to) { dcp::Memory::publish_new(from, to); }
};
#else
struct MyMedium : dcp::Memory {
  bool publish_new(std::string const& from, std::string const& to) { return dcp::Memory::publish_new(from, to); }
};
#endif

void save_all(dcp::SelfComm& self, MyMedium const& medium, float& rate) { dcp::save<dcp::BasicSafeTensors<MyMedium>>(self, {medium, "ckpt"}, {{"rate", rate}}); }
int main() {}
