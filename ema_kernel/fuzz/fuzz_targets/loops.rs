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
    elements: Vec<(u32, u32)>,
}

fuzz_target!(|case: Case| {
    let (ema, init): (Vec<f32>, Vec<f32>) =
        case.elements.iter().map(|&(ema, init)| (f32::from_bits(ema), f32::from_bits(init))).unzip();
    let halves: Vec<u16> = case.elements.iter().map(|&(_, bits)| (bits >> 16) as u16).collect();
    let (decay, threads) = (f64::from(case.decay) / f64::from(u16::MAX), usize::from(case.threads));
    check(&ema, &init, &init, decay, threads, |x| x, |x| x);
    check(
        &ema,
        &init,
        &halves,
        decay,
        threads,
        |x| bf16::from_bits(x).to_f32(),
        |x| bf16::from_f32(x).to_bits(),
    );
    let halves: Vec<f16> = halves.into_iter().map(f16::from_bits).collect();
    check(&ema, &init, &halves, decay, threads, f16::to_f32, f16::from_f32);
});

fn check<P: Element<Average = f32>>(
    ema: &[f32],
    init: &[f32],
    policy: &[P],
    decay: f64,
    threads: usize,
    widen: impl Fn(P) -> f32,
    narrow: impl Fn(f32) -> P,
) {
    let weight = (1.0 - decay) as f32;
    let lerp = |start: f32, end: f32| {
        if weight < 0.5 { start + weight * (end - start) } else { end - (end - start) * (1.0 - weight) }
    };
    let averaged: Vec<f32> = ema.iter().zip(policy).map(|(&ema, &policy)| lerp(ema, widen(policy))).collect();
    let mut ours = ema.to_vec();
    update(&mut ours, policy, decay, threads);
    assert!(ours.iter().zip(&averaged).all(|(a, b)| same(*a, *b)), "update: {ours:?}, not {averaged:?}");

    let (mut restarted, mut ours) = (policy.to_vec(), ema.to_vec());
    reset(&mut restarted, &mut ours, init, threads);
    assert!(ours.iter().zip(init).all(|(a, b)| a.to_bits() == b.to_bits()), "reset: the average is not init");
    let rounded = ema.iter().map(|&x| widen(narrow(x)));
    assert!(restarted.into_iter().map(&widen).zip(rounded).all(|(a, b)| same(a, b)), "reset of {ema:?}");
}

/// Equal bits, or both NaN: the payload of a NaN may vary.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}
