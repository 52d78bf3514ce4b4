// SPDX-License-Identifier: Apache-2.0
// error: dcp: Quantized<Scheme, Base> needs a storage as its Base, over which the quantized tensors lie - dcp::SafeTensors, for one
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/storage/quantized.hpp>

#ifdef MISTAKE
using Base = int;
#else
using Base = dcp::SafeTensors;
#endif

void save_all(dcp::SelfComm& self, float& rate) { dcp::save<dcp::Quantized<dcp::Mxfp4, Base>>(self, "ckpt", {{"rate", rate}}); }
int main() {}
