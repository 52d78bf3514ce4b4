// SPDX-License-Identifier: Apache-2.0
// error: dcp: a Stager needs  static constexpr std::string_view name  - for the report
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/storage/safetensors.hpp>

#ifdef MISTAKE
using Chosen = int;
#else
using Chosen = dcp::DeferredStager;
#endif

void save_all(dcp::SelfComm& self, float& rate) { dcp::async_save<dcp::SafeTensors, Chosen>(self, "ckpt", {{"rate", rate}}).wait(); }
int main() {}
