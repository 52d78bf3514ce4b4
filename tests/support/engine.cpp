// SPDX-License-Identifier: Apache-2.0
#include "engine.hpp"

namespace dcp::detail {
template class SafeTensorsDriver<>;
template class QuantizedDriver<>;
template class GgufDriver<>;
template class QuantizedFinder<>;
template class GroupEncoding<>;
template class TransposedEncoding<>;
template class FlatEncoding<>;
template class GgufEncoding<>;
template class GroupQuantizer<>;
template class GgufQuantizer<>;
template class TorchDcpDriver<>;
template class TransformedEncoding<>;
template Contents read_contents<>(CommRef, AnyStorage const&, PlaceRef const&, LoadSettings const&);
template Report save_state<>(CommRef, AnyStorage const&, PlaceRef const&, StateDict const&, SaveSettings const&);
template Report load_state<>(CommRef, AnyStorage const&, PlaceRef const&, StateDict const&, LoadSettings const&);
template OwnedState load_owned<>(CommRef, AnyStorage const&, PlaceRef const&, std::vector<std::string> const&, LoadSettings);
template Report reshard_state<>(CommRef, StateDict const&, StateDict const&, ReshardOptions const&);
template void remove_checkpoint<>(CommRef, PlaceRef const&);
template class BackgroundSave<>;
template class Staging<>;
template struct PendingSave<>;
template std::shared_ptr<PendingSave<>> begin_save<>(CommRef, AnyStorage const&, PlaceRef const&, StateDict const&, SaveSettings const&, StagerRef, std::shared_ptr<Stage<>> const&, CommitWork, SaveEventCallback, PlanCache<>*, KnownPlace const*);
}  // namespace dcp::detail
namespace dcp {
template class StridedEncoding<>;
}  // namespace dcp
namespace dcp::torch::detail {
template class MetadataReader<>;
template class ObjectWriter<>;
}  // namespace dcp::torch::detail
