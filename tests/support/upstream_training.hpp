// SPDX-License-Identifier: Apache-2.0
#pragma once
// A real training in plain C++, small and deterministic: linear layers with ReLU behind each, Adam, and as loss minus the sum of the outputs
// (with upstream's plain sum two steps kill all ReLUs of this network, and then losses are equal whatever was loaded). Parameters and optimizer state lie over the ranks as a strategy says; every rank computes the gradient of whole parameters from the
// same input, and updates the part that it holds. So each strategy gives the same bits as one process alone.

#include "support/held_tensor.hpp"

#include <dcp/core/state_dict.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace dcp::test {

/// Fully sharded: rows split over all ranks.
struct Fsdp {
  using Rules = Placement<Shard<0>>;
  static constexpr bool plain = false;
  template <class C>
  static DeviceMesh<1> mesh(C const& world) {
    return {world, {world.size()}};
  }
};
/// Hybrid: two replicas, each split over half of the ranks.
struct Hsdp {
  using Rules = Placement<Replicate, Shard<0>>;
  static constexpr bool plain = false;
  template <class C>
  static DeviceMesh<2> mesh(C const& world) {
    return {world, {2, world.size() / 2}};
  }
};
/// Replicated: plain tensors on all ranks, no mesh in their type.
struct Ddp {
  using Rules = Placement<Replicate>;
  static constexpr bool plain = true;
  template <class C>
  static DeviceMesh<1> mesh(C const& world) {
    return {world, {world.size()}};
  }
};

/// Numbers in [0, 1) that are the same everywhere.
class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_{seed} {}
  float operator()() { return static_cast<float>(engine_() >> 8) / static_cast<float>(1 << 24); }
  std::vector<float> operator()(std::size_t count) {
    std::vector<float> values(count);
    for (auto& value : values) value = (*this)();
    return values;
  }

 private:
  std::mt19937 engine_;
};

template <class Strategy>
using TrainedTensor = Held<float, typename Strategy::Rules>;

template <class Strategy>
void add_to(StateDict& state, std::string const& name, TrainedTensor<Strategy>& held) {
  if constexpr (Strategy::plain) state.add(name, TensorView<float>{held.memory, held.tensor.shape()});
  else state.add(name, held.tensor);
}

/// Whole values of parameters, by their names.
using Whole = std::map<std::string, std::vector<float>>;

/// Linear layers of sizes[0] -> sizes[1] -> ..., ReLU behind each.
template <class Strategy>
class Network {
 public:
  struct Parameter {
    std::string name;
    TrainedTensor<Strategy> value;

    template <class Mesh>
    Parameter(std::string named, Mesh const& mesh, Extents const& shape) : name{std::move(named)}, value{mesh, shape} {}
  };

  /// `name`: of layer i, whose parameters are then name(i).weight and name(i).bias.
  template <class C, class Name>
  Network(C const& world, std::vector<std::int64_t> sizes, std::uint32_t seed, Name const& name) : sizes_{std::move(sizes)} {
    Random random{seed};
    auto const mesh = Strategy::mesh(world);
    for (std::size_t i = 0; i + 1 < sizes_.size(); ++i) {
      float const scale = 1 / std::sqrt(static_cast<float>(sizes_[i]));
      auto const add = [&](std::string const& which, Extents const& shape) {
        Parameter& parameter = parameters_.emplace_back(name(i + 1) + which, mesh, shape);
        auto whole = random(static_cast<std::size_t>(shape.elements()));
        for (auto& x : whole) x = (2 * x - 1) * scale;
        parameter.value.fill(whole);
      };
      add(".weight", {sizes_[i + 1], sizes_[i]});
      add(".bias", {sizes_[i + 1]});
    }
  }

  StateDict state() {
    StateDict state;
    for (auto& parameter : parameters_) add_to<Strategy>(state, parameter.name, parameter.value);
    return state;
  }
  std::deque<Parameter>& parameters() { return parameters_; }
  std::size_t inputs() const { return static_cast<std::size_t>(sizes_.front()); }

  /// Collective.
  template <class C>
  Whole gather(C& world) {
    Whole whole;
    for (auto const& parameter : parameters_) whole[parameter.name] = gathered(world, parameter.value);
    return whole;
  }

  /// The loss of `rows` inputs, and its gradient in `gradient`. Collective.
  template <class C>
  float loss(C& world, std::vector<float> const& input, std::size_t rows, Whole& gradient) {
    Whole const whole = gather(world);
    std::vector<std::vector<float>> outputs{input};
    for (std::size_t l = 0; l + 1 < sizes_.size(); ++l) {
      auto const in = static_cast<std::size_t>(sizes_[l]), out = static_cast<std::size_t>(sizes_[l + 1]);
      auto const &weight = whole.at(parameters_[2 * l].name), &bias = whole.at(parameters_[2 * l + 1].name), &x = outputs.back();
      std::vector<float> y(rows * out);
      for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t o = 0; o < out; ++o) {
          float sum = bias[o];
          for (std::size_t i = 0; i < in; ++i) sum += weight[o * in + i] * x[r * in + i];
          y[r * out + o] = std::max(sum, 0.0f);
        }
      outputs.push_back(std::move(y));
    }
    float loss = 0;
    for (float const y : outputs.back()) loss -= y;
    std::vector<float> upper(outputs.back().size(), -1.0f);
    for (std::size_t l = sizes_.size() - 1; l-- > 0;) {
      auto const in = static_cast<std::size_t>(sizes_[l]), out = static_cast<std::size_t>(sizes_[l + 1]);
      auto const &weight = whole.at(parameters_[2 * l].name), &x = outputs[l], &y = outputs[l + 1];
      auto& of_weight = gradient[parameters_[2 * l].name] = std::vector<float>(out * in);
      auto& of_bias = gradient[parameters_[2 * l + 1].name] = std::vector<float>(out);
      std::vector<float> lower(rows * in);
      for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t o = 0; o < out; ++o) {
          if (y[r * out + o] <= 0) continue;
          float const g = upper[r * out + o];
          of_bias[o] += g;
          for (std::size_t i = 0; i < in; ++i) of_weight[o * in + i] += g * x[r * in + i], lower[r * in + i] += g * weight[o * in + i];
        }
      upper = std::move(lower);
    }
    return loss;
  }

 private:
  std::vector<std::int64_t> sizes_;
  std::deque<Parameter> parameters_;
};

/// Upstream's model: 8 -> 16 -> 32 -> 64 -> 8, parameters net1.0.weight, net1.0.bias, net2.0.weight, ...
template <class Strategy, class C>
Network<Strategy> dummy(C const& world, std::uint32_t seed = 0) {
  return Network<Strategy>{world, {8, 16, 32, 64, 8}, seed, [](std::size_t i) { return "net" + std::to_string(i) + ".0"; }};
}

/// Adam over some parameters of a network; its state has the names of PyTorch's: state.<parameter>.exp_avg, param_groups.0.lr, ...
template <class Strategy>
class Adam {
 public:
  struct Moments {
    std::string name;
    TrainedTensor<Strategy> exp_avg, exp_avg_sq;
    float step = 0;

    template <class Mesh>
    Moments(std::string named, Mesh const& mesh, Extents const& shape) : name{std::move(named)}, exp_avg{mesh, shape}, exp_avg_sq{mesh, shape} {}
  };
  float learning_rate, epsilon = 1e-8f;
  std::vector<float> betas{0.9f, 0.999f};

  /// `takes`: whether a parameter is optimized (the others are frozen).
  template <class C, class Takes>
  Adam(C const& world, Network<Strategy>& network, float lr, Takes const& takes) : learning_rate{lr}, network_{&network} {
    auto const mesh = Strategy::mesh(world);
    for (auto const& parameter : network.parameters()) {
      auto const& shape = parameter.value.tensor.shape();
      if (takes(parameter.name)) moments_.emplace_back(parameter.name, mesh, shape);
    }
  }
  template <class C>
  Adam(C const& world, Network<Strategy>& network, float lr) : Adam{world, network, lr, [](std::string const&) { return true; }} {}

  StateDict state() {
    StateDict state;
    for (auto& of : moments_) {
      state.add("state." + of.name + ".step", TensorView<float>{std::span{&of.step, 1}, Extents{}});
      add_to<Strategy>(state, "state." + of.name + ".exp_avg", of.exp_avg);
      add_to<Strategy>(state, "state." + of.name + ".exp_avg_sq", of.exp_avg_sq);
    }
    state.add("param_groups.0.lr", learning_rate).add("param_groups.0.betas", betas).add("param_groups.0.eps", epsilon);
    return state;
  }
  std::deque<Moments>& moments() { return moments_; }

  void step(Whole const& gradient) {
    for (auto& of : moments_) {
      auto& parameters = network_->parameters();
      auto const parameter = std::find_if(parameters.begin(), parameters.end(), [&](auto const& p) { return p.name == of.name; });
      of.step += 1;
      float const scale = learning_rate / (1 - std::pow(betas[0], of.step)), root = std::sqrt(1 - std::pow(betas[1], of.step));
      auto const& g = gradient.at(of.name);
      float *first = of.exp_avg.memory.data(), *second = of.exp_avg_sq.memory.data();
      parameter->value.each([&](float& value, std::size_t at) {   // the three lie in memory alike
        *first = betas[0] * *first + (1 - betas[0]) * g[at];
        *second = betas[1] * *second + (1 - betas[1]) * g[at] * g[at];
        value -= scale * *first++ / (std::sqrt(*second++) / root + epsilon);
      });
    }
  }
  /// Whole moments and steps, by the names of the state. Collective.
  template <class C>
  Whole gather(C& world) {
    Whole whole;
    for (auto const& of : moments_) {
      whole["state." + of.name + ".step"] = {of.step};
      whole["state." + of.name + ".exp_avg"] = gathered(world, of.exp_avg);
      whole["state." + of.name + ".exp_avg_sq"] = gathered(world, of.exp_avg_sq);
    }
    return whole;
  }

 private:
  Network<Strategy>* network_;
  std::deque<Moments> moments_;
};

/// `steps` steps on random inputs of 8 rows from seed 0; the losses. Collective.
template <class Strategy, class C>
std::vector<float> train(C& world, Network<Strategy>& network, Adam<Strategy>& optimizer, int steps) {
  Random random{0};
  std::vector<float> losses;
  for (int i = 0; i < steps; ++i) {
    Whole gradient;
    losses.push_back(network.loss(world, random(8 * network.inputs()), 8, gradient));
    optimizer.step(gradient);
  }
  return losses;
}

}  // namespace dcp::test
