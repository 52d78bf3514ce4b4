// SPDX-License-Identifier: Apache-2.0
// A medium is where bytes lie, a storage what they mean.
// error: dcp: a Storage needs a member type  Place  - the second argument of save and load
#include <dcp/checkpoint/load.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/media/local_fs.hpp>
#include <dcp/storage/safetensors.hpp>

#ifdef MISTAKE
using MyStorage = dcp::LocalFs;
#else
using MyStorage = dcp::SafeTensors;
#endif

void load_all(dcp::SelfComm& self, float& rate) { dcp::load<MyStorage>(self, "ckpt", {{"rate", rate}}); }
int main() {}
