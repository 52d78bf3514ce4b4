// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Storage needs a member type  Place  - the second argument of save and load
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/storage/safetensors.hpp>

struct Json {};

#ifdef MISTAKE
using MyStorage = Json;
#else
using MyStorage = dcp::SafeTensors;
#endif

void save_all(dcp::SelfComm& self, float& rate) { dcp::save<MyStorage>(self, "ckpt", {{"rate", rate}}); }
int main() {}
