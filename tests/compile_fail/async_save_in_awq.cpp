// SPDX-License-Identifier: Apache-2.0
// error: dcp: this storage only reads - a Quantized<Scheme, ...> that is saved needs a scheme that can be written, which AnyScheme, Awq and Nf4 are not
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/storage/quantized.hpp>

#ifdef MISTAKE
using Scheme = dcp::Awq;
#else
using Scheme = dcp::Gptq;
#endif

void save_all(dcp::SelfComm& self, float& rate) { static_cast<void>(dcp::async_save<dcp::Quantized<Scheme, dcp::SafeTensors>>(self, "ckpt", {{"rate", rate}})); }
int main() {}
