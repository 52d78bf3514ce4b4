// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Medium needs  void rename_file(std::string const& from, std::string const& to)  - atomically, over a file that is there
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#ifdef MISTAKE
struct MyMedium : dcp::Memory {
  void rename_file(std::string const& from, std::string const& to) = delete;
};
#else
struct MyMedium : dcp::Memory {
};
#endif

void save_all(dcp::SelfComm& self, MyMedium const& medium, float& rate) { dcp::save<dcp::BasicSafeTensors<MyMedium>>(self, {medium, "ckpt"}, {{"rate", rate}}); }
int main() {}
