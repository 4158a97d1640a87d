//! Printing to people and scripts who may have gone away: as `println!` and its kin, but a closed pipe is no panic.

macro_rules! out {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _nobody_listens = write!(std::io::stdout(), $($arg)*);
    }};
}

macro_rules! outln {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _nobody_listens = writeln!(std::io::stdout(), $($arg)*);
    }};
}

macro_rules! errln {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _nobody_listens = writeln!(std::io::stderr(), $($arg)*);
    }};
}
