//! Dates of the Gregorian calendar and Unix seconds, without leap seconds.
//!
//! The algorithms are Howard Hinnant's days_from_civil and civil_from_days. A guest may write registers that make no
//! date (month 0, day 40); such a date counts on from the nearest one and never panics.

use super::state::DateTimeState;
use crate::StateError;

const SECONDS_PER_DAY: i64 = 86_400;

/// What the clock registers hold: binary, 24 hours, year 0 to 9999.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) year: u16,
    pub(super) month: u8,
    pub(super) day: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

impl DateTime {
    /// Years outside 0 to 9999 show modulo 10000, as four digits do.
    pub(super) fn from_unix(seconds: i64) -> DateTime {
        let days = seconds.div_euclid(SECONDS_PER_DAY) + 719_468;
        let second_of_day = seconds.rem_euclid(SECONDS_PER_DAY);
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        DateTime {
            year: year.rem_euclid(10_000) as u16,
            month: month as u8,
            day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
            hour: (second_of_day / 3600) as u8,
            minute: (second_of_day / 60 % 60) as u8,
            second: (second_of_day % 60) as u8,
        }
    }

    pub(super) fn to_unix(self) -> i64 {
        self.days() * SECONDS_PER_DAY
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }

    /// Days since 1970-01-01.
    fn days(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let month_from_march = (month + 9) % 12;
        let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        era * 146_097 + day_of_era - 719_468
    }

    /// 1 (Sunday) to 7.
    pub(super) fn weekday(self) -> u8 {
        // 1970-01-01 was a Thursday.
        (self.days() + 4).rem_euclid(7) as u8 + 1
    }

    pub(super) fn save(self) -> DateTimeState {
        let DateTime {
            year,
            month,
            day,
            hour,
            minute,
            second,
        } = self;
        DateTimeState {
            year,
            month,
            day,
            hour,
            minute,
            second,
        }
    }

    pub(super) fn restore(state: DateTimeState) -> Result<DateTime, StateError> {
        let DateTimeState {
            year,
            month,
            day,
            hour,
            minute,
            second,
        } = state;
        if year > 9999 {
            return Err(StateError::Invalid {
                device: "cmos",
                field: "year",
            });
        }
        Ok(DateTime {
            year,
            month,
            day,
            hour,
            minute,
            second,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> (u16, u8, u8, u8, u8, u8, u8) {
        let d = DateTime::from_unix(seconds);
        assert_eq!(d.to_unix(), seconds);
        (
            d.year,
            d.month,
            d.day,
            d.hour,
            d.minute,
            d.second,
            d.weekday(),
        )
    }

    #[test]
    fn known_dates() {
        assert_eq!(at(0), (1970, 1, 1, 0, 0, 0, 5));
        assert_eq!(at(951_827_696), (2000, 2, 29, 12, 34, 56, 3));
        assert_eq!(at(1_709_251_199), (2024, 2, 29, 23, 59, 59, 5));
        assert_eq!(at(1_709_251_200), (2024, 3, 1, 0, 0, 0, 6));
        assert_eq!(at(4_102_444_800), (2100, 1, 1, 0, 0, 0, 6));
        assert_eq!(at(-1), (1969, 12, 31, 23, 59, 59, 4));
    }

    #[test]
    fn registers_that_make_no_date_count_on() {
        let odd = DateTime {
            year: 2026,
            month: 13,
            day: 32,
            hour: 25,
            minute: 61,
            second: 99,
        };
        let date = DateTime::from_unix(odd.to_unix());
        assert_eq!((date.year, date.month, date.day), (2027, 1, 2));
        let zero = DateTime {
            year: 0,
            month: 0,
            day: 0,
            hour: 0,
            minute: 0,
            second: 0,
        };
        assert_eq!(DateTime::from_unix(zero.to_unix()).month, 12);
    }
}
