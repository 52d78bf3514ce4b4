// SPDX-License-Identifier: Apache-2.0
// test: --schema 405b --ranks 8960
// test: --schema experts --ranks 4096
//
// What a save of a large model would cost on a cluster that is not at hand: planning time and memory of single ranks, bytes, balance,
// files, and the size of every record. The planner is the real one; tensors have no memory.
//
//   simulate [--schema 405b|experts|small] [--ranks N] [--planned N]
//
//   405b      a dense model of 126 layers in bfloat16 and its Adam state in float32: FSDP over 8-way tensor parallelism
//   experts   64 experts in each of 32 layers, every expert on an expert-parallel rank of its own: 64 different sets of names
//   small     1.3 million tensors of 16 KiB, sharded over all ranks
#include <dcp/checkpoint/simulate.hpp>
#include <dcp/dcp.hpp>

#include <cstdint>
#include <iostream>
#include <stdexcept>
#include <string>

namespace {

using Mesh = dcp::Axes<struct dp, struct tp>;
// Tensor parallelism cuts first, FSDP what is left.
using Columns = dcp::PlacementOn<Mesh, dcp::On<tp, dcp::OrderedShard<0, 0>>, dcp::On<dp, dcp::OrderedShard<0, 1>>>;
using Rows = dcp::PlacementOn<Mesh, dcp::On<tp, dcp::Shard<1>>, dcp::On<dp, dcp::Shard<0>>>;
using Vector = dcp::PlacementOn<Mesh, dcp::On<dp, dcp::Shard<0>>>;   // replicated over tensor parallelism

/// A parameter and, as Adam keeps it, its two moments and a full-precision copy.
template <class P>
void add(dcp::StateDict& state, dcp::SimulatedRank& rank, dcp::DeviceMesh<P::mesh_rank> const& mesh, std::string const& name, dcp::Extents const& shape) {
  state.add("model." + name, rank.tensor<dcp::bf16, P>(mesh, shape));
  for (auto const* part : {"exp_avg", "exp_avg_sq"}) state.add("optimizer." + std::string{part} + '.' + name, rank.tensor<float, P>(mesh, shape));
}

dcp::StateDict dense(dcp::SimulatedRank& rank) {
  constexpr std::int64_t hidden = 16384, feed_forward = 53248, vocabulary = 128256, key_value = 1024;
  dcp::DeviceMesh<2> const mesh{rank, {rank.size() / 8, 8}};
  dcp::StateDict state;
  add<Columns>(state, rank, mesh, "embed_tokens.weight", {vocabulary, hidden});
  for (int layer = 0; layer < 126; ++layer) {
    std::string const at = "layers." + std::to_string(layer) + '.';
    add<Columns>(state, rank, mesh, at + "self_attn.q_proj.weight", {hidden, hidden});
    add<Columns>(state, rank, mesh, at + "self_attn.k_proj.weight", {key_value, hidden});
    add<Columns>(state, rank, mesh, at + "self_attn.v_proj.weight", {key_value, hidden});
    add<Rows>(state, rank, mesh, at + "self_attn.o_proj.weight", {hidden, hidden});
    add<Columns>(state, rank, mesh, at + "mlp.gate_proj.weight", {feed_forward, hidden});
    add<Columns>(state, rank, mesh, at + "mlp.up_proj.weight", {feed_forward, hidden});
    add<Rows>(state, rank, mesh, at + "mlp.down_proj.weight", {hidden, feed_forward});
    add<Vector>(state, rank, mesh, at + "input_layernorm.weight", {hidden});
    add<Vector>(state, rank, mesh, at + "post_attention_layernorm.weight", {hidden});
  }
  add<Vector>(state, rank, mesh, "norm.weight", {hidden});
  add<Columns>(state, rank, mesh, "lm_head.weight", {vocabulary, hidden});
  return state;
}

constexpr std::int64_t experts = 64;

dcp::StateDict mixture(dcp::SimulatedRank& rank) {
  constexpr std::int64_t hidden = 4096, expert_width = 1536, vocabulary = 151936, key_value = 512;
  dcp::DeviceMesh<2> const mesh{rank, {rank.size() / experts, experts}};   // the experts' ranks stand side by side
  std::int64_t const expert = rank.rank() % experts;
  dcp::DeviceMesh<1> const replicas = mesh.sub<0>({expert});
  using All = dcp::Placement<dcp::Shard<0>, dcp::Shard<0>>;
  using Own = dcp::Placement<dcp::Shard<0>>;
  dcp::StateDict state;
  add<All>(state, rank, mesh, "embed_tokens.weight", {vocabulary, hidden});
  for (int layer = 0; layer < 32; ++layer) {
    std::string const at = "layers." + std::to_string(layer) + '.';
    add<All>(state, rank, mesh, at + "self_attn.q_proj.weight", {hidden, hidden});
    add<All>(state, rank, mesh, at + "self_attn.k_proj.weight", {key_value, hidden});
    add<All>(state, rank, mesh, at + "self_attn.v_proj.weight", {key_value, hidden});
    add<All>(state, rank, mesh, at + "self_attn.o_proj.weight", {hidden, hidden});
    add<All>(state, rank, mesh, at + "input_layernorm.weight", {hidden});
    add<All>(state, rank, mesh, at + "post_attention_layernorm.weight", {hidden});
    add<All>(state, rank, mesh, at + "mlp.gate.weight", {experts, hidden});
    std::string const own = at + "mlp.experts." + std::to_string(expert) + '.';
    add<Own>(state, rank, replicas, own + "gate_proj.weight", {expert_width, hidden});
    add<Own>(state, rank, replicas, own + "up_proj.weight", {expert_width, hidden});
    add<Own>(state, rank, replicas, own + "down_proj.weight", {hidden, expert_width});
  }
  add<All>(state, rank, mesh, "norm.weight", {hidden});
  add<All>(state, rank, mesh, "lm_head.weight", {vocabulary, hidden});
  return state;
}

dcp::StateDict many(dcp::SimulatedRank& rank) {
  dcp::DeviceMesh<1> const mesh{rank, {rank.size()}};
  dcp::StateDict state;
  for (int i = 0; i < 1'300'000; ++i) state.add("blocks." + std::to_string(i) + ".weight", rank.tensor<dcp::bf16, dcp::Placement<dcp::Shard<0>>>(mesh, dcp::Extents{64, 128}));
  return state;
}

}  // namespace

int main(int argc, char** argv) try {
  std::string schema = "405b";
  std::int64_t ranks = 8960, planned = 8;
  for (int i = 1; i < argc; ++i) {
    std::string const argument = argv[i];
    auto const value = [&] {
      if (++i == argc) throw std::runtime_error(argument + " needs a value");
      return std::string{argv[i]};
    };
    if (argument == "--schema") schema = value();
    else if (argument == "--ranks") ranks = std::stoll(value());
    else if (argument == "--planned") planned = std::stoll(value());
    else throw std::runtime_error("usage: simulate [--schema 405b|experts|small] [--ranks N] [--planned N]");
  }
  dcp::SimulatedJob job;
  job.ranks = ranks;
  for (std::int64_t i = 0; i < planned; ++i) job.planned.push_back(planned == 1 ? 0 : i * (ranks - 1) / (planned - 1));
  if (schema == "405b") {
    job.state = dense;
    job.kind_of = [](std::int64_t) { return 0; };
  } else if (schema == "experts") {
    job.state = mixture;
    job.kind_of = [](std::int64_t rank) { return rank % experts; };
  } else if (schema == "small") {
    job.state = many;
    job.kind_of = [](std::int64_t) { return 0; };
  } else {
    throw std::runtime_error("no schema is called " + schema);
  }
  std::cout << dcp::simulate_save<dcp::SafeTensors>(job);
} catch (std::exception const& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
