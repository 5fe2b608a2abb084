//! Optimizers' updates: AdamW over a state of 8 bits, the twin of `kernels/blockwise_adamw.py`.

use crate::error::{Error, Result};
use crate::team::{Shared, Team};

/// Entries that share their greatest magnitude.
pub const BLOCK: usize = 256;

/// Entries that one task moves: enough to pay for the task, little enough for the inner cache.
const TASK: usize = 32 * BLOCK;

/// Bits of a share that are looked up; the others are compared.
const LOOKED_UP: u32 = 14;

/// What 8 bits stand for, and how to find the nearest.
pub struct Map<'a> {
    values: &'a [f32; 256],
    /// A share takes the code of the first edge that it isn't beyond, 255 beyond all.
    edges: &'a [f32; 255],
    /// By a share's upper bits, the code of the lowest share that has them.
    first: Vec<u8>,
}

impl<'a> Map<'a> {
    /// A map of 256 rising values with the 255 edges between them.
    ///
    /// # Errors
    /// Other lengths, or edges that don't rise.
    pub fn new(values: &'a [f32], edges: &'a [f32]) -> Result<Self> {
        let (Ok(table), Ok(between)) = (values.try_into(), <&[f32; 255]>::try_from(edges)) else {
            let message = format!("map: expected 256 values and 255 edges, got {} and {}", values.len(), edges.len());
            return Err(Error::failure(message));
        };
        if !between.is_sorted() || between.iter().any(|edge| !edge.is_finite()) {
            return Err(Error::failure("map: expected edges that rise"));
        }
        let first = (0..1u32 << LOOKED_UP).map(|upper| {
            let bits = upper << (32 - LOOKED_UP);
            // the lowest of negative numbers has the greatest magnitude
            let lowest = if bits >> 31 == 1 { bits | (u32::MAX >> LOOKED_UP) } else { bits };
            let lowest = f32::from_bits(lowest);
            between.partition_point(|&edge| edge < lowest) as u8
        });
        Ok(Self { values: table, edges: between, first: first.collect() })
    }

    fn code(&self, share: f32) -> u8 {
        let mut code = self.first[(share.to_bits() >> (32 - LOOKED_UP)) as usize];
        while code < 255 && share > self.edges[usize::from(code)] {
            code += 1;
        }
        code
    }
}

/// The numbers of one update.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    /// Memory of the gradient's mean.
    pub beta1: f64,
    /// Memory of the gradient's square.
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f32,
    /// The learning rate over the mean's correction.
    pub rate: f32,
    /// The correction of the square's root.
    pub correction: f32,
    /// What weight decay leaves of a weight.
    pub kept: f32,
}

/// A state: a code for each entry, a scale for each block of them.
pub struct State<'a> {
    /// Codes into the map.
    pub codes: &'a mut [u8],
    /// The greatest magnitude of each block.
    pub greatest: &'a mut [f32],
    /// What codes stand for.
    pub map: Map<'a>,
}

/// Moves the weight and both states in place.
///
/// # Errors
/// Lengths that don't belong together.
pub fn blockwise_adamw(
    team: &Team,
    weight: &mut [f32],
    gradient: &[f32],
    mean: State<'_>,
    square: State<'_>,
    factors: Factors,
) -> Result<()> {
    let count = weight.len();
    for (name, found, expected) in [
        ("gradient", gradient.len(), count),
        ("codes of means", mean.codes.len(), count),
        ("codes of squares", square.codes.len(), count),
        ("scales of means", mean.greatest.len(), count.div_ceil(BLOCK)),
        ("scales of squares", square.greatest.len(), count.div_ceil(BLOCK)),
    ] {
        if found != expected {
            return Err(Error::failure(format!("{name}: expected {expected}, got {found}")));
        }
    }
    let weight = Shared::new(weight);
    let (mean_map, square_map) = (&mean.map, &square.map);
    let (mean_codes, mean_scales) = (Shared::new(mean.codes), Shared::new(mean.greatest));
    let (square_codes, square_scales) = (Shared::new(square.codes), Shared::new(square.greatest));
    team.each(count.div_ceil(TASK), &|task| {
        for start in (task * TASK..count.min((task + 1) * TASK)).step_by(BLOCK) {
            let (entries, block) = (start..count.min(start + BLOCK), start / BLOCK);
            // SAFETY: tasks have blocks of their own.
            let (weight, mean, mean_scale, square, square_scale) = unsafe {
                (
                    weight.part(entries.clone()),
                    mean_codes.part(entries.clone()),
                    mean_scales.part(block..block + 1),
                    square_codes.part(entries.clone()),
                    square_scales.part(block..block + 1),
                )
            };
            let mut means = [0.0; BLOCK];
            let mut squares = [0.0; BLOCK];
            read(mean_map, mean, mean_scale[0], &mut means);
            read(square_map, square, square_scale[0], &mut squares);
            update(weight, &gradient[entries], &mut means, &mut squares, factors);
            mean_scale[0] = write(mean_map, mean, &means);
            square_scale[0] = write(square_map, square, &squares);
        }
    });
    Ok(())
}

fn update(weight: &mut [f32], gradient: &[f32], means: &mut [f32], squares: &mut [f32], factors: Factors) {
    let Factors { beta1, beta2, epsilon, rate, correction, kept } = factors;
    let (new1, new2) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
    let (beta1, beta2) = (beta1 as f32, beta2 as f32);
    for (((weight, &gradient), mean), square) in weight.iter_mut().zip(gradient).zip(means).zip(squares) {
        *mean = *mean * beta1 + new1 * gradient;
        *square = *square * beta2 + new2 * gradient * gradient;
        *weight = *weight * kept - rate * (*mean / (square.sqrt() / correction + epsilon));
    }
}

fn read(map: &Map<'_>, codes: &[u8], greatest: f32, values: &mut [f32; BLOCK]) {
    for (value, &code) in values.iter_mut().zip(codes) {
        *value = map.values[usize::from(code)] * greatest;
    }
}

/// Rounds to the nearest codes; the greatest magnitude.
fn write(map: &Map<'_>, codes: &mut [u8], values: &[f32; BLOCK]) -> f32 {
    let greatest = values.iter().fold(0.0f32, |greatest, value| greatest.max(value.abs()));
    let scale = greatest.max(f32::MIN_POSITIVE); // a block of zeros stays one
    for (code, value) in codes.iter_mut().zip(values) {
        *code = map.code(value / scale);
    }
    greatest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rising values with the zero in the middle, dense toward it, and the edges between.
    fn table() -> ([f32; 256], [f32; 255]) {
        let values: [f32; 256] = std::array::from_fn(|code| {
            let x = (code as f32 - 127.0) / 128.0;
            x * x * x
        });
        (values, std::array::from_fn(|code| (values[code] + values[code + 1]) / 2.0))
    }

    #[test]
    fn codes_are_those_of_the_first_edge_not_passed() {
        let (values, edges) = table();
        let map = Map::new(&values, &edges).unwrap();
        let near = edges.iter().flat_map(|edge| [edge.next_down(), *edge, edge.next_up()]);
        for share in near.chain((0..=20_000).map(|step| step as f32 / 10_000.0 - 1.0)).chain([1e-30, -1e-41, -0.0]) {
            let expected = edges.iter().position(|&edge| share <= edge).unwrap_or(255);
            assert_eq!(usize::from(map.code(share)), expected, "{share}");
        }
    }

    #[test]
    fn no_number_makes_it_panic() {
        let (values, edges) = table();
        let map = Map::new(&values, &edges).unwrap();
        for share in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN] {
            map.code(share);
        }
    }

    #[test]
    fn what_does_not_belong_together_is_refused() {
        let (values, edges) = table();
        assert!(Map::new(&values[1..], &edges).is_err());
        assert!(Map::new(&values, &edges[1..]).is_err());
        let mut falling = edges;
        falling.reverse();
        assert!(Map::new(&values, &falling).is_err());
        let factors = Factors { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, rate: 0.1, correction: 1.0, kept: 1.0 };
        for (gradients, codes, scales) in [(300, 300, 2), (299, 300, 2), (300, 299, 2), (300, 300, 1)] {
            let (mut weight, gradient) = (vec![0.0; 300], vec![0.0; gradients]);
            let (mut mean, mut square) = ((vec![0; codes], vec![0.0; scales]), (vec![0; 300], vec![0.0; 2]));
            let state = |codes, greatest| State { codes, greatest, map: Map::new(&values, &edges).unwrap() };
            let (mean, square) = (state(&mut mean.0, &mut mean.1), state(&mut square.0, &mut square.1));
            let found = Team::run(|team| blockwise_adamw(team, &mut weight, &gradient, mean, square, factors));
            assert_eq!(found.is_ok(), (gradients, codes, scales) == (300, 300, 2));
        }
    }
}
