// apply: one read of g, one read and one write of x (eqs. 12 and 13); commits the rows as it goes.
#ifndef ADAFACTOR_APPLY_H
#define ADAFACTOR_APPLY_H

#include "tensor.h"

namespace ADAFACTOR_NS {
namespace {

// The scalars of one slice. Without momentum `normalised` holds alpha, with momentum (1 - beta1), beside the clip.
template <class T>
struct Step {
  T normalised, decay_factor, beta1, alpha;
  Step(const adafactor_tensor& t, const Workspace& w, int64_t slice) {
    const double sign = (t.flags & ADAFACTOR_MAXIMIZE) ? -1 : 1;
    const double step_size = w.step_size[2 * slice], inverse_clip = w.step_size[2 * slice + 1];
    normalised = T(sign * inverse_clip * (t.momentum ? 1 - t.beta1 : step_size));
    decay_factor = T(t.decay_factor);
    beta1 = T(t.beta1);
    alpha = T(step_size);
  }
};

// x -= a * g * c (eq. 13), where a holds everything but the columns. `moved` may be x, or g.
template <class T>
inline void descend(const T* g, const T* c, T a, T decay_factor, const T* x, T* moved, size_t n) {
  ADAFACTOR_INDEPENDENT
  for (size_t j = 0; j < n; ++j) moved[j] = decay_factor * x[j] - g[j] * a * c[j];
}

// The same for the multiples of 4 * kLanes in n, adding the new x^2 to `s` as `Lanes` would; returns how many they are.
template <class T>
inline size_t descend_lanes(const T* g, const T* c, T a, T decay_factor, const T* x, T* moved, size_t n,
                            T (&s)[4][kLanes]) {
  size_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    for (size_t k = 0; k < 4 * kLanes * sizeof(T); k += 64) {
      ask(reinterpret_cast<const char*>(g + j + kTile) + k);
      ask(reinterpret_cast<const char*>(x + j + kTile) + k);
    }
    for (size_t q = 0; q < 4; ++q) {
      ADAFACTOR_INDEPENDENT
      for (size_t k = 0; k < kLanes; ++k) {
        const size_t i = j + q * kLanes + k;
        const T value = decay_factor * x[i] - g[i] * a * c[i];
        moved[i] = value;
        s[q][k] += value * value;
      }
    }
  }
  return j;
}

// The same, and the sum of the new x^2 as `sum<Square>` finds it, without a second look at x.
template <class T>
inline T descend_squares(const T* g, const T* c, T a, T decay_factor, const T* x, T* moved, size_t n) {
  if (n < kLanes) {
    descend(g, c, a, decay_factor, x, moved, n);
    return sum<Square>(moved, n);
  }
  Lanes<T> squares;
  T s[4][kLanes] = {};
  const size_t j = descend_lanes(g, c, a, decay_factor, x, moved, n, s);
  memcpy(squares.group, s, sizeof(s));
  descend(g + j, c + j, a, decay_factor, x + j, moved + j, n - j);
  squares.template add<Square>(moved + j, n - j);
  return squares.total();
}

// eq. 12, then eq. 13.
template <class T>
inline void descend_momentum(const T* u, const Step<T>& step, const T* momentum, T* new_momentum, const T* x, T* moved,
                             size_t n) {
  ADAFACTOR_INDEPENDENT
  for (size_t j = 0; j < n; ++j) {
    const T average = step.beta1 * momentum[j] + u[j];
    new_momentum[j] = average;
    moved[j] = step.decay_factor * x[j] - step.alpha * average;
  }
}

// Where apply leaves x and momentum.
inline void* target_of(const adafactor_tensor& t) { return t.target ? t.target : t.param; }
inline void* momentum_target_of(const adafactor_tensor& t) {
  return t.momentum_target ? t.momentum_target : t.momentum;
}

// One tile of x and of momentum as the loops above take them, and where they leave what `finish` writes back.
template <class T>
struct Target {
  const adafactor_tensor& t;
  size_t first, n;
  bool stochastic;
  T x_tile[kTile], momentum_tile[kTile], residual_tile[kTile];
  const T *x, *momentum;
  T *moved, *new_momentum;
  double before = 0;  // sum of the x^2 that is there

  Target(const adafactor_tensor& tensor, size_t first_element, size_t count)
      : t(tensor), first(first_element), n(count) {
    const bool half = t.param_dtype == ADAFACTOR_BFLOAT16 || t.param_dtype == ADAFACTOR_FLOAT16;
    stochastic = half && (t.flags & ADAFACTOR_STOCHASTIC_ROUNDING);
    x = load(t.param_dtype, t.param, first, x_tile, n);
    if (t.flags & ADAFACTOR_Q_KNOWN) before = double(sum<Square>(x, n));
    moved = room(t.param_dtype, target_of(t), first, x_tile);
    if (t.residual) {
      const T* residual = load(ADAFACTOR_BFLOAT16, t.residual, first, residual_tile, n);
      for (size_t k = 0; k < n; ++k) x_tile[k] += residual[k];  // x, which is not of T
    }
    momentum = t.momentum ? load(t.momentum_dtype, t.momentum, first, momentum_tile, n) : nullptr;
    new_momentum = t.momentum ? room(t.momentum_dtype, momentum_target_of(t), first, momentum_tile) : nullptr;
  }

  // Rounds a part of the tile whose elements have the indices index, index + 1, ... in the whole parameter.
  void round(size_t offset, size_t count, uint64_t index) {
    narrow_stochastic(t, moved + offset, target_of(t), first + offset, count, index);
  }

  // What rounding has cut off x; of what is not finite nothing is left.
  void keep_rest() {
    const T* stored = load(t.param_dtype, target_of(t), first, residual_tile, n);
    for (size_t k = 0; k < n; ++k) {
      const T rest = moved[k] - stored[k];
      moved[k] = stored[k] - stored[k] == 0 ? rest : T(0);
    }
    close(ADAFACTOR_BFLOAT16, moved, t.residual, first, n);
  }

  double finish() {
    if (!stochastic) close(t.param_dtype, moved, target_of(t), first, n);
    if (momentum) close(t.momentum_dtype, new_momentum, momentum_target_of(t), first, n);
    if (t.residual) keep_rest();
    if (!(t.flags & ADAFACTOR_SCALE_PARAMETER)) return 0;
    return double(sum<Square>(load(t.param_dtype, target_of(t), first, x_tile, n), n));  // as stored
  }
};

// Walks over the runs of x[outer][rows][inner][columns]; `columns` is where the run's columns start.
struct Cursor {
  size_t n, inner, m, i, k_inner, block;
  void next() {
    if (++k_inner < inner) return;
    k_inner = 0;
    if (++i < n) return;
    i = 0;
    block += inner * m;
  }
  size_t columns() const { return block + k_inner * m; }
};

// Index of an element in the whole parameter, of which this may be a shard.
inline uint64_t global_index(const adafactor_tensor& t, uint64_t run, uint64_t column) {
  const uint64_t n = uint64_t(t.rows), inner = uint64_t(t.inner), b = run / (n * inner);
  run += (b * (uint64_t(t.global_rows) - n) + uint64_t(t.row_offset)) * inner;
  return run * uint64_t(t.global_columns) + uint64_t(t.column_offset) + column;
}

// Sums of x^2, after the step and as it was found.
struct Squares {
  double after = 0, before = 0;
};

template <class T>
Squares apply_factored(const adafactor_tensor& t, const Workspace& w, const Unit& unit) {
  const size_t n = size_t(t.rows), m = size_t(t.columns), inner = size_t(t.inner);
  const Step<T> step(t, w, unit.slice);
  // Where columns come first, commit has done both sides: the rows are in S and the columns in finished.
  const bool transposed = columns_first(t);
  const T *finished = at<T>(transposed ? w.S : w.finished, 0), *scaled = at<T>(transposed ? w.finished : w.S, 0);
  T* row = at<T>(t.row, 0);
  const auto factor = [transposed, finished, row, &step](size_t r) {
    if (transposed) return finished[r] * step.normalised;
    row[r] = finished[r];
    return inverse_root(finished[r]) * step.normalised;
  };
  T tile[kTile], u[kTile];
  Squares Q;
  const bool known = t.flags & ADAFACTOR_Q_KNOWN;
  // Nothing to convert and no momentum: one look at everything. The squares of several rows are one sum only where
  // every row fills its lanes.
  const bool plain = t.param_dtype == Own<T>::dtype && t.grad_dtype == Own<T>::dtype && !t.momentum &&
                     (m > kTile / 2 || m % (4 * kLanes) == 0);

  const size_t first = (size_t(unit.b) * n + size_t(unit.begin)) * inner;
  const size_t last = (size_t(unit.b_end - 1) * n + size_t(unit.end)) * inner;
  Cursor cursor = {n, inner, m, size_t(unit.begin), 0, size_t(unit.b) * inner * m};
  for (size_t r = first; r < last;) {
    const size_t runs = runs_of_a_tile(m, last - r);
    if (plain && runs > 1) {  // short rows, the squares of which are one sum
      const T *x = at<T>(t.param, r * m), *g = static_cast<const T*>(t.grad) + r * m;
      T* moved = at<T>(target_of(t), r * m);
      Lanes<T> squares;
      T s[4][kLanes] = {};
      if (known) Q.before += double(sum<Square>(x, runs * m));
      for (size_t q = 0; q < runs; ++q, cursor.next())
        descend_lanes(g + q * m, scaled + cursor.columns(), factor(r + q), step.decay_factor, x + q * m, moved + q * m,
                      m, s);
      memcpy(squares.group, s, sizeof(s));
      Q.after += double(squares.total());
      r += runs;
      continue;
    }
    if (plain) {
      const T a = factor(r);
      const T* c = scaled + cursor.columns();
      for (size_t j = 0; j < m; j += kTile) {
        const size_t count = least(kTile, m - j);
        const T* x = at<T>(t.param, r * m + j);
        const T* g = static_cast<const T*>(t.grad) + r * m + j;
        if (known) Q.before += double(sum<Square>(x, count));
        Q.after += double(descend_squares(g, c + j, a, step.decay_factor, x, at<T>(target_of(t), r * m + j), count));
      }
      cursor.next();
      ++r;
      continue;
    }
    const Cursor start = cursor;
    for (size_t j = 0; j < m; j += kTile) {
      const size_t count = least(kTile, m - j);
      const T* g = load(t.grad_dtype, t.grad, r * m + j, tile, runs * count);
      Target<T> target(t, r * m + j, runs * count);
      cursor = start;
      for (size_t q = 0; q < runs; ++q, cursor.next()) {
        const T a = factor(r + q);
        const T *c = scaled + cursor.columns() + j, *h = g + q * count;
        if (target.momentum) {
          for (size_t k = 0; k < count; ++k) u[q * count + k] = h[k] * a * c[k];
        } else {
          descend(h, c, a, step.decay_factor, target.x + q * count, target.moved + q * count, count);
        }
      }
      if (target.momentum)
        descend_momentum(u, step, target.momentum, target.new_momentum, target.x, target.moved, runs * count);
      if (target.stochastic)
        for (size_t q = 0; q < runs; ++q) target.round(q * count, count, global_index(t, r + q, j));
      Q.before += target.before;
      Q.after += target.finish();
    }
    r += runs;
  }
  return Q;
}

template <class T>
Squares apply_whole(const adafactor_tensor& t, const Workspace& w, const Unit& unit) {
  const size_t m = size_t(t.columns);
  const Step<T> step(t, w, unit.slice);
  T tile[kTile], u[kTile];
  Squares Q;
  for (size_t j = size_t(unit.begin); j < size_t(unit.end); j += kTile) {
    const size_t n = least(kTile, size_t(unit.end) - j), start = size_t(unit.b) * m + j;
    const T* g = load(t.grad_dtype, t.grad, start, tile, n);
    T* v = at<T>(t.row, start);
    Target<T> target(t, start, n);
    normalise(t, g, v, v, u, n);
    for (size_t k = 0; k < n; ++k) u[k] *= step.normalised;
    if (target.momentum) {
      descend_momentum(u, step, target.momentum, target.new_momentum, target.x, target.moved, n);
    } else {
      const T* x = target.x;
      T* moved = target.moved;
      ADAFACTOR_INDEPENDENT
      for (size_t k = 0; k < n; ++k) moved[k] = step.decay_factor * x[k] - u[k];
    }
    if (target.stochastic) target.round(0, n, global_index(t, uint64_t(unit.b), j));
    Q.before += target.before;
    Q.after += target.finish();
  }
  return Q;
}

template <class T>
void apply(const adafactor_tensor& t, const Workspace& w, const Unit& unit) {
  const Squares Q = (t.flags & ADAFACTOR_FACTORED) ? apply_factored<T>(t, w, unit) : apply_whole<T>(t, w, unit);
  if (t.flags & ADAFACTOR_SCALE_PARAMETER) w.Q[unit.index] = Q.after, w.Q_found[unit.index] = Q.before;
}

}  // namespace
}  // namespace ADAFACTOR_NS
#endif
