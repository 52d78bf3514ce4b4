// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Storage needs a member type  Options  - an aggregate; empty if there is nothing to choose
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>

#ifdef MISTAKE
struct MyStorage {
  using Place = std::string;
  static std::unique_ptr<dcp::AnyStorage> open() { return nullptr; }
  static dcp::PlaceRef locate(Place const& place) { return {nullptr, place}; }
};
#else
struct MyStorage {
  using Place = std::string;
  struct Options {};
  static std::unique_ptr<dcp::AnyStorage> open(Options const&) { return nullptr; }
  static dcp::PlaceRef locate(Place const& place) { return {nullptr, place}; }
};
#endif

void save_all(dcp::SelfComm& self, float& rate) { dcp::save<MyStorage>(self, "ckpt", {{"rate", rate}}); }
int main() {}
