// SPDX-License-Identifier: Apache-2.0
#pragma once
// Included in front of every test: the bodies behind the verbs are compiled once, in engine.cpp, and not once per test.
#include <dcp/dcp.hpp>

namespace dcp::detail {
extern template class SafeTensorsDriver<>;
extern template class QuantizedDriver<>;
extern template class GgufDriver<>;
extern template class QuantizedFinder<>;
extern template class GroupEncoding<>;
extern template class TransposedEncoding<>;
extern template class FlatEncoding<>;
extern template class GgufEncoding<>;
extern template class GroupQuantizer<>;
extern template class GgufQuantizer<>;
extern template class TorchDcpDriver<>;
extern template class TransformedEncoding<>;
extern template Contents read_contents<>(CommRef, AnyStorage const&, PlaceRef const&, LoadSettings const&);
extern template Report save_state<>(CommRef, AnyStorage const&, PlaceRef const&, StateDict const&, SaveSettings const&);
extern template Report load_state<>(CommRef, AnyStorage const&, PlaceRef const&, StateDict const&, LoadSettings const&);
extern template OwnedState load_owned<>(CommRef, AnyStorage const&, PlaceRef const&, std::vector<std::string> const&, LoadSettings);
extern template Report reshard_state<>(CommRef, StateDict const&, StateDict const&, ReshardOptions const&);
extern template void remove_checkpoint<>(CommRef, PlaceRef const&);
extern template class BackgroundSave<>;
extern template class Staging<>;
extern template struct PendingSave<>;
extern template std::shared_ptr<PendingSave<>> begin_save<>(CommRef, AnyStorage const&, PlaceRef const&, StateDict const&, SaveSettings const&, StagerRef, std::shared_ptr<Stage<>> const&, CommitWork, SaveEventCallback, PlanCache<>*, KnownPlace const*);
}  // namespace dcp::detail
namespace dcp {
extern template class StridedEncoding<>;
}  // namespace dcp
namespace dcp::torch::detail {
extern template class MetadataReader<>;
extern template class ObjectWriter<>;
}  // namespace dcp::torch::detail
