// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Medium that does not rename directories needs  bool put_file(std::string const& path, dcp::ConstByteSpan bytes, dcp::Expected expected)  - atomically, false if something else is there
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#ifdef MISTAKE
struct MyMedium : dcp::Memory {
  static constexpr bool renames_directories = false;
};
#else
struct MyMedium : dcp::Memory {
  static constexpr bool renames_directories = false;
  bool put_file(std::string const& path, dcp::ConstByteSpan bytes, dcp::Expected expected);
};
#endif

void save_all(dcp::SelfComm& self, MyMedium const& medium, float& rate) { dcp::save<dcp::BasicSafeTensors<MyMedium>>(self, {medium, "ckpt"}, {{"rate", rate}}); }
int main() {}
