// Before the attention of a decoder layer: queries, keys and values of m new tokens, normed and turned.
//
//   z = norm(x), part p = z W_p^T + b_p, by head norm(part), then (a, b) -> (a cos - b sin, b cos + a sin) half-split.
// Sums, norms and rotation are in fp32; z is rounded to T, and the results are.

constexpr int PARTS = 3, MOST_ROWS = 32;

struct Part {
  Linear linear;
  Norm norm;  // of each head
  int64_t normed, turned;
};
struct Before {
  int64_t K, head, parts;  // channels of x, of a head
  Norm norm;
  Part part[PARTS];
};
struct Results {  // of each part: [m, N] as the attention reads it, and (where not null) before rotation
  T *turned[PARTS], *plain[PARTS];
};

// One head by its angles: channels past `width` stay.
static void turn(const float* head, const float* cos, const float* sin, int64_t width, int64_t channels, T* to) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int n = half - i < 16 ? (int)(half - i) : 16;
    F a = load(head + i, n), b = load(head + half + i, n);
    store(to + i, a * load(cos + i, n) - b * load(sin + i, n), n);
    store(to + half + i, b * load(cos + half + i, n) + a * load(sin + half + i, n), n);
  }
  for (int64_t i = width; i < channels; i++) narrow(to + i, head[i]);
}

// cos, sin [m or 1, width], `apart` floats from row to row.
extern "C" void before_attention(const Before* of, const T* x, const float* cos, const float* sin, int64_t width,
                                 int64_t apart, const Results* to, int64_t m, int threads) {
  const int64_t K = of->K, head = of->head;
  int64_t first_tile[PARTS + 1] = {0}, first_head[PARTS + 1] = {0}, weights = 0;
  for (int p = 0; p < of->parts; p++) {
    const int64_t N = of->part[p].linear.N;
    first_tile[p + 1] = first_tile[p] + tiles(N);
    first_head[p + 1] = first_head[p] + N / head;
    weights += N * K;
  }
  const int64_t all_tiles = first_tile[of->parts], all_heads = first_head[of->parts];
  const int team = weights > ALONE ? threads : 1;
  std::unique_ptr<T[]> states(new T[team * m * K]);
  std::unique_ptr<float[]> parts(new float[m * all_heads * head]);
#pragma omp parallel num_threads(team)
  {
    T* z = states.get() + thread() * m * K;
    for (int64_t i = 0; i < m; i++) normed<NORM>(of->norm, x + i * K, z + i * K, K);
    Rows rows(m, K);
    rows.enter(z);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < all_tiles; t++) {
      int p = 0;
      while (t >= first_tile[p + 1]) p++;
      const Linear& linear = of->part[p].linear;
      const int64_t n = (t - first_tile[p]) * TILE;
      const int count = width_of(n, linear.N);
      float out[MOST_ROWS * TILE];
      columns(rows, m, linear, K, n, count, out);
      for (int64_t i = 0; i < m; i++)
        memcpy(parts.get() + (i * all_heads + first_head[p]) * head + n, out + i * TILE, count * sizeof(float));
    }
#pragma omp for schedule(static)
    for (int64_t h = 0; h < m * all_heads; h++) {
      const int64_t i = h / all_heads, j = h % all_heads;
      int p = 0;
      while (j >= first_head[p + 1]) p++;
      const Part& part = of->part[p];
      const int64_t place = i * part.linear.N + (j - first_head[p]) * head;
      float* channels = parts.get() + h * head;
      if (part.normed) normed<HEAD_NORM>(part.norm, channels, channels, head);
      if (to->plain[p]) turn(channels, nullptr, nullptr, 0, head, to->plain[p] + place);
      turn(channels, cos + i * apart, sin + i * apart, part.turned ? width : 0, head, to->turned[p] + place);
    }
  }
}
