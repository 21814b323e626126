// Which data-parallel rank and which micro-batch each sequence goes to. algorithm/planning.py documents the result.
//
//   1. balance   sequences over ranks: longest processing time first, then exchanges out of the heaviest rank
//   2. pack      a rank's sequences into micro-batches: best-fit decreasing under the token budget
//   3. even out  the micro-batches of a rank to about the same cost, if the budget lets every rank do so
//   4. order     costliest first, so that micro-batches that run at the same time on all ranks cost about the same
//
// One thread, no randomness, ties by index: the plan is a function of its arguments.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <queue>
#include <set>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

constexpr double kBalanced = 1.001;    // heaviest rank / lower bound at which exchanges stop
constexpr int kExchangesPerRank = 16;  // bounds the exchanges; a few a rank are typical

struct Problem {
  const int64_t* lengths;
  int count;
  int64_t budget;
  int ranks;
  int multiple_of;
  double attention_cost;

  double cost(int item) const {
    const double length = static_cast<double>(lengths[item]);
    return length + attention_cost * length * length;
  }
  // Decreasing length, ties by index. Cost grows with length: the order by cost is the same.
  bool before(int a, int b) const {
    return lengths[a] != lengths[b] ? lengths[a] > lengths[b] : a < b;
  }
  int round_up(int microbatches) const { return (microbatches + multiple_of - 1) / multiple_of * multiple_of; }
};

struct Bin {
  std::vector<int> items;
  int64_t tokens = 0;
  double cost = 0;

  void add(const Problem& problem, int item) {
    items.push_back(item);
    tokens += problem.lengths[item];
    cost += problem.cost(item);
  }
};

struct Rank {
  std::vector<int> items;  // in decreasing length
  double cost = 0;
};

// (cost, index), the lightest on top.
using Load = std::pair<double, int>;
using Loads = std::priority_queue<Load, std::vector<Load>, std::greater<Load>>;

std::vector<int> by_decreasing_length(const Problem& problem) {
  std::vector<int> order(problem.count);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int a, int b) { return problem.before(a, b); });
  return order;
}

// No assignment has a heaviest rank below this.
double cost_lower_bound(const Problem& problem, const std::vector<int>& order) {
  double total = 0;
  for (int item : order) total += problem.cost(item);
  return order.empty() ? 0 : std::max(total / problem.ranks, problem.cost(order.front()));
}

// ---- 1. balance

void assign_longest_first(const Problem& problem, const std::vector<int>& order, std::vector<Rank>& ranks) {
  Loads lightest;
  for (int rank = 0; rank < problem.ranks; ++rank) lightest.emplace(0.0, rank);
  for (int item : order) {
    const int rank = lightest.top().second;
    lightest.pop();
    ranks[rank].items.push_back(item);
    ranks[rank].cost += problem.cost(item);
    lightest.emplace(ranks[rank].cost, rank);
  }
}

// The exchange that brings two ranks closest: position `give` of the heavier one for position `take` of the lighter
// one, where take == size stands for nothing. Both lists decrease, so one pass over each finds it.
struct Exchange {
  size_t give = 0, take = 0;
  double moved = 0;  // cost that changes sides; 0: nothing helps
};

Exchange best_exchange(const Problem& problem, const Rank& heavy, const Rank& light) {
  const double gap = heavy.cost - light.cost;
  Exchange best;
  double best_miss = gap / 2;
  size_t take = 0;
  const auto consider = [&](size_t give, size_t other) {
    const double received = other < light.items.size() ? problem.cost(light.items[other]) : 0.0;
    const double moved = problem.cost(heavy.items[give]) - received;
    const double miss = std::abs(moved - gap / 2);
    if (moved > 0 && moved < gap && miss < best_miss * (1 - 1e-9)) {
      best_miss = miss;
      best = {give, other, moved};
    }
  };
  for (size_t give = 0; give < heavy.items.size(); ++give) {
    const double wanted = problem.cost(heavy.items[give]) - gap / 2;
    while (take < light.items.size() && problem.cost(light.items[take]) > wanted) ++take;
    if (take > 0) consider(give, take - 1);
    consider(give, take);
  }
  return best;
}

void insert_sorted(const Problem& problem, std::vector<int>& items, int item) {
  const auto before = [&](int a, int b) { return problem.before(a, b); };
  items.insert(std::lower_bound(items.begin(), items.end(), item, before), item);
}

void apply(const Problem& problem, const Exchange& exchange, Rank& heavy, Rank& light) {
  const int given = heavy.items[exchange.give];
  heavy.items.erase(heavy.items.begin() + exchange.give);
  if (exchange.take < light.items.size()) {
    const int taken = light.items[exchange.take];
    light.items.erase(light.items.begin() + exchange.take);
    insert_sorted(problem, heavy.items, taken);
  }
  insert_sorted(problem, light.items, given);
  heavy.cost -= exchange.moved;
  light.cost += exchange.moved;
}

// Takes load off the heaviest rank until it is balanced, or no single exchange with any rank helps.
void exchange_until_balanced(const Problem& problem, double lower_bound, std::vector<Rank>& ranks) {
  std::vector<int> order(problem.ranks);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t round = 0; round < int64_t{kExchangesPerRank} * problem.ranks; ++round) {
    std::sort(order.begin(), order.end(), [&](int a, int b) {
      return std::make_pair(ranks[a].cost, a) < std::make_pair(ranks[b].cost, b);
    });
    Rank& heavy = ranks[order.back()];
    if (heavy.cost <= kBalanced * lower_bound) return;
    Exchange exchange;
    for (size_t i = 0; i + 1 < order.size() && exchange.moved == 0; ++i) {
      exchange = best_exchange(problem, heavy, ranks[order[i]]);
      if (exchange.moved > 0) apply(problem, exchange, heavy, ranks[order[i]]);
    }
    if (exchange.moved == 0) return;
  }
}

// ---- 2. pack

int64_t free_tokens(const Problem& problem, const Bin& bin) { return problem.budget - bin.tokens; }

// Each sequence into the fullest micro-batch that still takes it. One above the budget fits nowhere, so it opens a
// micro-batch, and leaves no room in it for another.
std::vector<Bin> best_fit_decreasing(const Problem& problem, const std::vector<int>& items) {
  std::vector<Bin> bins;
  std::set<std::pair<int64_t, int>> room;  // (free tokens, bin)
  for (int item : items) {
    int index = static_cast<int>(bins.size());
    const auto tightest = room.lower_bound({problem.lengths[item], 0});
    if (tightest == room.end()) {
      bins.emplace_back();
    } else {
      index = tightest->second;
      room.erase(tightest);
    }
    bins[index].add(problem, item);
    room.emplace(free_tokens(problem, bins[index]), index);
  }
  return bins;
}

// ---- 3. even out

// The same sequences in `microbatches` bins of about equal cost, the longest to the lightest bin each time. Nothing
// when one would overflow: a nearly full rank has to keep what best fit found.
std::optional<std::vector<Bin>> evened_out(const Problem& problem, int microbatches, const std::vector<int>& items) {
  std::vector<Bin> bins(std::min<size_t>(microbatches, items.size()));
  Loads lightest;
  for (size_t index = 0; index < bins.size(); ++index) lightest.emplace(0.0, static_cast<int>(index));
  for (int item : items) {
    const int index = lightest.top().second;
    lightest.pop();
    Bin& bin = bins[index];
    if (!bin.items.empty() && problem.lengths[item] > free_tokens(problem, bin)) return std::nullopt;
    bin.add(problem, item);
    lightest.emplace(bin.cost, index);
  }
  return bins;
}

using Packed = std::vector<std::vector<Bin>>;  // the bins of each rank

// All ranks are evened out or none: a mixture makes unlike micro-batches wait for each other.
std::optional<Packed> all_evened_out(const Problem& problem, int microbatches, const std::vector<Rank>& ranks) {
  Packed even;
  for (const Rank& rank : ranks) {
    auto bins = evened_out(problem, microbatches, rank.items);
    if (!bins) return std::nullopt;
    even.push_back(std::move(*bins));
  }
  return even;
}

// ---- 4. order

void costliest_first(std::vector<Bin>& bins) {
  for (Bin& bin : bins) std::sort(bin.items.begin(), bin.items.end());
  std::sort(bins.begin(), bins.end(), [](const Bin& a, const Bin& b) {
    return a.cost != b.cost ? a.cost > b.cost : a.items.front() < b.items.front();
  });
}

struct Result {
  std::vector<int32_t> rank, microbatch;
  std::vector<double> cost;
  int microbatches = 0;
};

Result solve(const Problem& problem) {
  std::vector<Rank> ranks(problem.ranks);
  const std::vector<int> order = by_decreasing_length(problem);
  assign_longest_first(problem, order, ranks);
  exchange_until_balanced(problem, cost_lower_bound(problem, order), ranks);

  Packed packed;
  size_t most = 0;
  for (const Rank& rank : ranks) {
    packed.push_back(best_fit_decreasing(problem, rank.items));
    most = std::max(most, packed.back().size());
  }
  Result result{std::vector<int32_t>(problem.count), std::vector<int32_t>(problem.count), {}, 0};
  result.microbatches = problem.round_up(static_cast<int>(most));
  if (auto even = all_evened_out(problem, result.microbatches, ranks)) packed = std::move(*even);

  for (int rank = 0; rank < problem.ranks; ++rank) {
    costliest_first(packed[rank]);
    double cost = 0;  // summed anew: the running sum has seen exchanges
    for (size_t microbatch = 0; microbatch < packed[rank].size(); ++microbatch) {
      for (int item : packed[rank][microbatch].items) {
        result.rank[item] = rank;
        result.microbatch[item] = static_cast<int32_t>(microbatch);
      }
      cost += packed[rank][microbatch].cost;
    }
    result.cost.push_back(cost);
  }
  return result;
}

py::tuple plan(const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& lengths, int64_t token_budget,
               int num_ranks, int multiple_of, double attention_cost) {
  const Problem problem{lengths.data(), static_cast<int>(lengths.size()), token_budget,
                        num_ranks,      multiple_of,                      attention_cost};
  Result result;
  {
    py::gil_scoped_release release;
    result = solve(problem);
  }
  return py::make_tuple(py::array(result.rank.size(), result.rank.data()),
                        py::array(result.microbatch.size(), result.microbatch.data()), result.microbatches,
                        py::array(result.cost.size(), result.cost.data()));
}

}  // namespace

PYBIND11_MODULE(_packing, module) {
  module.doc() = "Balanced packing of sequences into micro-batches; see megatron_gspo.batching.planning.";
  module.def("plan", &plan, py::arg("lengths"), py::arg("token_budget"), py::arg("num_ranks"), py::arg("multiple_of"),
             py::arg("attention_cost"));
}
