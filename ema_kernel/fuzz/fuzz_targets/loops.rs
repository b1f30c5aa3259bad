//! Both loops, on any bits, against their formulas one element at a time with the `half` crate's rounding.
#![no_main]

use _ema_kernel::ema::{Element, reset, update};
use half::{bf16, f16};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Case {
    decay: u16,
    threads: u8,
    cuts: Vec<u8>,
    elements: Vec<(u32, u32)>,
}

fuzz_target!(|case: Case| {
    let (ema, policy): (Vec<f32>, Vec<f32>) =
        case.elements.iter().map(|&(ema, policy)| (f32::from_bits(ema), f32::from_bits(policy))).unzip();
    let halves: Vec<u16> = case.elements.iter().map(|&(_, bits)| (bits >> 16) as u16).collect();
    let (decay, threads) = (f64::from(case.decay) / f64::from(u16::MAX), usize::from(case.threads));
    let averages = Averages { ema, cuts: case.cuts, decay, threads };
    averages.check(&policy, |x| x, |x| x);
    averages.check(&halves, |x| bf16::from_bits(x).to_f32(), |x| bf16::from_f32(x).to_bits());
    let halves: Vec<f16> = halves.into_iter().map(f16::from_bits).collect();
    averages.check(&halves, f16::to_f32, f16::from_f32);
});

struct Averages {
    ema: Vec<f32>,
    cuts: Vec<u8>,
    decay: f64,
    threads: usize,
}

impl Averages {
    fn check<P: Element<Average = f32>>(
        &self,
        policy: &[P],
        widen: impl Fn(P) -> f32,
        narrow: impl Fn(f32) -> P,
    ) {
        let weight = (1.0 - self.decay) as f32;
        let lerp = |start: f32, end: f32| {
            if weight < 0.5 { start + weight * (end - start) } else { end - (end - start) * (1.0 - weight) }
        };
        let averaged: Vec<f32> =
            self.ema.iter().zip(policy).map(|(&ema, &policy)| lerp(ema, widen(policy))).collect();
        let mut ours = self.ema.clone();
        let mut policies = self.cut(policy);
        let read: Vec<&[P]> = policies.iter().map(Vec::as_slice).collect();
        update(&mut ours, &read, self.decay, self.threads);
        assert!(ours.iter().zip(&averaged).all(|(a, b)| same(*a, *b)), "update: {ours:?}, not {averaged:?}");

        let mut ours = self.ema.clone();
        let mut written: Vec<&mut [P]> = policies.iter_mut().map(Vec::as_mut_slice).collect();
        reset(&mut written, &mut ours, policy, self.threads);
        assert!(ours.iter().zip(policy).all(|(a, b)| same(*a, widen(*b))), "the average is not init");
        let restarted = policies.concat().into_iter().map(&widen);
        let rounded = self.ema.iter().map(|&x| widen(narrow(x)));
        assert!(restarted.zip(rounded).all(|(a, b)| same(a, b)), "reset of {:?}", self.ema);
    }

    /// Copies of parts of the policy, of the lengths that the case gives; the last part is the rest.
    fn cut<P: Element>(&self, policy: &[P]) -> Vec<Vec<P>> {
        let mut rest = policy;
        let mut parts = Vec::new();
        for &length in &self.cuts {
            let (part, after) = rest.split_at(rest.len().min(length.into()));
            parts.push(part.to_vec());
            rest = after;
        }
        parts.push(rest.to_vec());
        parts
    }
}

/// Equal bits, or both NaN: the payload of a NaN may vary.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}
