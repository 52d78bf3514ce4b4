// SPDX-License-Identifier: Apache-2.0
#pragma once
// Where the tensors of a state are in those of a checkpoint, if names are mapped and it is not one for one. See core/name_map.hpp.

#include <dcp/base/config.hpp>
#include <dcp/core/name_map.hpp>
#include <dcp/core/strided_tensor.hpp>
#include <dcp/core/tensor_view.hpp>
#include <dcp/plan/catalog.hpp>
#include <dcp/plan/shares.hpp>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

/// The tensors that a checkpoint has of a state. Together they are the state's, each element once.
struct Arrangement {
  std::vector<TensorSpec> tensors;   // in name order. The layouts of those that are cut say only their shapes
  std::vector<MappedTensor> from;    // of each of them: boxes of the state's tensors, by their numbers

  bool cut(std::size_t t) const { return from[t].cut; }
  /// The element of the state's tensor that element `index` of tensor `t` is.
  template <class = Deferred>
  std::pair<std::uint32_t, Extents> origin(std::size_t t, Extents const& index) const {
    Box const one{index, Extents::filled(index.rank(), 1)};
    Box common;
    for (auto const& box : from[t].from)
      if (intersect(one, box.region(), common)) return {box.tensor, box.original(one).origin};
    throw Error{ErrorCode::unknown, from[t].name + ": nothing of the state is at " + to_string(index)};
  }
};

namespace detail {

/// The rank that writes the element at `index` of stored tensor `t`. `arrangement`: nullptr where the stored tensors are the state's.
template <class = Deferred>
std::int64_t writer_of(Shares const& shares, Arrangement const* arrangement, std::size_t t, Extents const& index) {
  if (arrangement == nullptr) return shares.writer_of(t, index);
  auto const [tensor, there] = arrangement->origin(t, index);
  return shares.writer_of(tensor, there);
}

/// Calls visit(box, held, memory) for a box of a tensor of the state as it lies in the stored one: `held` and `memory` are what make_transfer wants.
template <class Visit>
void place_box(PlacedBox const& placed, Box const& box, Box const& held, MemoryView const& memory, Visit visit) {
  Box common;
  if (intersect(box, placed.from, common)) visit(placed.placed(common), placed.placed(held), MemoryView{memory.data, permuted(memory.strides, placed.order)});
}

/// A piece of `tensor`, with dimensions in the order of what it is placed in: read row by row as it is stored, not element by element.
template <class = Deferred>
std::shared_ptr<CatalogTensor const> transposed(CatalogTensor const& tensor, StoredPiece const& piece, PlacedBox const& placed) {
  Extents const strides = row_major_strides(piece.box.shape), shape = placed.original(piece.box).shape;
  std::vector<std::uint64_t> there(static_cast<std::size_t>(shape.rank()), 0);
  for (int d = 0; d < shape.rank(); ++d) there[static_cast<std::size_t>(placed.order[d])] = static_cast<std::uint64_t>(strides[d]);
  auto view = std::make_shared<CatalogTensor>(CatalogTensor{tensor.name, tensor.dtype, shape, {}, {}});
  view->encoding = std::make_shared<StridedEncoding<>>(tensor.name, tensor.dtype, shape, there, piece.box.size(), ElementTransform{});
  view->parts.push_back({StoredPiece{piece.file, piece.offset, Box::whole(view->encoding->parts()[0].shape)}});
  return view;
}

/// What a load reads of tensors that are put together.
struct AssembledTensor {
  std::unique_ptr<CatalogTensor> tensor{};   // nullptr: it is one stored tensor, under its name
  std::string absent{}, fault{};             // what the checkpoint lacks of it; what is wrong with what it has
};

/// Puts the tensors of `state` together from the pieces of stored ones. find(name): the stored tensor, or nullptr; taken(tensor): of one that was found.
/// Pure; reads nothing.
template <class Find, class Taken>
std::vector<AssembledTensor> assemble_tensors(Arrangement const& arrangement, std::vector<TensorSpec> const& state, Find find, Taken taken) {
  std::vector<AssembledTensor> result(state.size());
  std::vector<std::uint8_t> encoded(state.size(), 0), plain(state.size(), 0);
  // Once, though a stored tensor may be in many places of one of the state's.
  auto const say = [](std::string& list, std::string const& sentence) {
    if (!list.ends_with(sentence)) list += (list.empty() ? "" : ", ") + sentence;
  };
  for (auto const& stored_form : arrangement.from) {
    if (!stored_form.cut) continue;
    CatalogTensor const* const stored = find(stored_form.name);
    if (stored != nullptr) taken(*stored);
    std::shared_ptr<CatalogTensor const> decoded;   // of an encoded one
    if (stored != nullptr && stored->encoding != nullptr) decoded = std::make_shared<CatalogTensor>(*stored);
    for (auto const& placed : stored_form.from) {
      AssembledTensor& one = result[placed.tensor];
      if (!one.tensor) one.tensor = std::make_unique<CatalogTensor>(CatalogTensor{state[placed.tensor].name, state[placed.tensor].dtype, state[placed.tensor].layout.shape, {}, {}});
      if (stored == nullptr) {
        say(one.absent, stored_form.name);
        continue;
      }
      if (!(stored->shape == stored_form.shape)) {
        say(one.fault, stored_form.name + " is " + to_string(stored->shape) + " in the checkpoint and " + to_string(stored_form.shape) + " by the names' rules");
        continue;
      }
      auto const add = [&](StoredPiece const& piece, std::vector<StoredPiece>& to) {
        Box common;
        if (!intersect(piece.box, placed.region(), common)) return;
        StoredPiece part = piece;
        part.box = placed.original(common);
        Extents order = placed.order;
        if (part.decoded == nullptr && !placed.in_order()) {
          part.decoded = transposed(*stored, piece, placed);
          order = in_given_order(order.rank());
        }
        // The whole of what is stored, in its own order of dimensions, at the coordinates that its elements have in the state's tensor.
        part.inside = std::make_shared<PieceArray>(PieceArray{permuted(placed.original(piece.box), order), order});
        to.push_back(std::move(part));
      };
      if (decoded != nullptr) {
        encoded[placed.tensor] = 1;
        StoredPiece piece{0, 0, Box::whole(stored->shape), 0, {}, decoded};
        add(piece, one.tensor->pieces);
        if (!plain[placed.tensor]) one.tensor->dtype = stored->dtype;
        continue;
      }
      if (plain[placed.tensor] && one.tensor->dtype != stored->dtype) say(one.fault, stored_form.name + " is " + std::string{to_string(stored->dtype)} + " and what it is joined to is " + std::string{to_string(one.tensor->dtype)});
      plain[placed.tensor] = 1;
      one.tensor->dtype = stored->dtype;
      for (auto const& piece : stored->pieces) add(piece, one.tensor->pieces);
      for (auto const& piece : stored->copies) add(piece, one.tensor->copies);
    }
  }
  for (std::size_t t = 0; t < result.size(); ++t) {
    AssembledTensor& one = result[t];
    if (!one.tensor) continue;
    one.tensor->of_encoded = encoded[t] && !plain[t];
    if (encoded[t] && plain[t] && !is_wide_float(one.tensor->dtype)) say(one.fault, "quantized tensors are joined to " + std::string{to_string(one.tensor->dtype)});
  }
  return result;
}

}  // namespace detail
}  // namespace dcp
