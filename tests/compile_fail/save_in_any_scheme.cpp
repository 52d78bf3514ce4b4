// SPDX-License-Identifier: Apache-2.0
// Whatever is found: there is nothing to find in what is to be written.
// error: dcp: this storage only reads - a Quantized<Scheme, ...> that is saved needs a scheme that can be written, which AnyScheme, Awq and Nf4 are not
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/storage/quantized.hpp>

#ifdef MISTAKE
using Scheme = dcp::AnyScheme;
#else
using Scheme = dcp::Mxfp4;
#endif

void save_all(dcp::SelfComm& self, float& rate) { dcp::save<dcp::Quantized<Scheme, dcp::SafeTensors>>(self, "ckpt", {{"rate", rate}}); }
int main() {}
