// SPDX-License-Identifier: GPL-2.0
//! Stands in for `compiler_builtins`, which the compiler links into every program: the image brings the
//! four memory functions it needs itself (`src/header.rs`) and uses no others.
#![allow(internal_features)]
#![feature(compiler_builtins)]
#![compiler_builtins]
#![no_std]
